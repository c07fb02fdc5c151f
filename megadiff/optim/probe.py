"""A few steps of an optimizer on tiny tensors, which show whether a run with it could be saved and resumed.

An optimizer of the user's own may keep state that it does not declare, in its parameters' state, in its groups or in
attributes of its own. The run would train and save, and fail or drift when it is resumed; so it is refused at the
start, where nothing is lost.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from megadiff.config.registry import naming
from megadiff.errors import ConfigError
from megadiff.optim.config import OptimizerConfig, Scale
from megadiff.optim.members import Member
from megadiff.optim.pieces import parameter_groups

STEPS, SAVED_AFTER = 4, 2
"""Number of steps that are taken, and after how many of them the state is carried into a second optimizer."""

_ROLES = ("hidden", "norm")
_SHAPES = ((4, 6), (7,))


def refuse_unsavable(
    member: Member, settings: OptimizerConfig, scale: Scale, *, device: torch.device, is_cut: bool = False
) -> None:
    """Refuse an optimizer that could not be saved and resumed in this run.

    Args:
        device: where the run's parameters are.
        is_cut: whether tensors are cut over ranks, so that a rank updates a part of one.

    Raises:
        ConfigError: the optimizer keeps what it does not declare, does not continue from what a checkpoint holds, or
            needs whole tensors where they are cut. The sentence names what to change.
    """
    if is_cut and not member.takes_pieces:
        raise ConfigError(
            f"{member} needs whole tensors (ELEMENTWISE = False), which are cut over ranks in this run; set "
            "parallel.distributed_optimizer=false and parallel.tensor=1"
        )
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        trial = _Trial(member, settings, scale, device)
        whole = trial.start()
        groups_before = [_without_parameters(group) for group in whole.param_groups]
        trial.take(whole, range(SAVED_AFTER))
        member.check_state(whole)
        _check_groups(member, groups_before, whole.param_groups)
        resumed = trial.resumed(whole)
        trial.take(whole, range(SAVED_AFTER, STEPS))
        member.check_state(whole)
        trial.take(resumed, range(SAVED_AFTER, STEPS))
        if not _equal(whole, resumed):
            raise ConfigError(
                f"{member} does not continue from its saved state: after a resume its updates differ; keep all that "
                "it needs in `state[parameter]` under STATE_KEYS or in `param_groups` under GROUP_STATE_KEYS"
            )
        filled = trial.start()
        member.complete_state(filled)
        trial.take(filled, range(STEPS))
        if not _equal(whole, filled):
            raise ConfigError(
                f"{member} does not begin with zeros as its state, or not with what its `initial_state` gives; let "
                f"`initial_state(parameter, group)` in {member.module.__name__} return the state before the first step"
            )
        if (
            is_cut
            and member.is_elementwise
            and not _agree(whole, trial.take(trial.start(cut=True), range(STEPS), cut=True))
        ):
            raise ConfigError(
                f"{member} updates an element by more than that element's values, so it needs whole tensors, which are "
                "cut over ranks in this run; set parallel.distributed_optimizer=false and parallel.tensor=1"
            )


class _Trial:
    """Tiny parameters with fixed values, their gradients at every step, and optimizers over them."""

    def __init__(self, member: Member, settings: OptimizerConfig, scale: Scale, device: torch.device) -> None:
        self._member, self._settings, self._scale, self._device = member, settings, scale, device

    def start(self, *, weights: Sequence[torch.Tensor] | None = None, cut: bool = False) -> torch.optim.Optimizer:
        """Return an optimizer over new parameters, each in two flat pieces if they are to be cut."""
        weights = weights if weights is not None else [self._values(shape, 0) for shape in _SHAPES]
        named = [
            (role, torch.nn.Parameter(piece.clone()))
            for role, weight in zip(_ROLES, weights, strict=True)
            for piece in (_pieces(weight) if cut else [weight])
        ]
        return self._member.build(parameter_groups(named, self._settings, self._scale), self._settings)

    def take(self, optimizer: torch.optim.Optimizer, steps: range, *, cut: bool = False) -> torch.optim.Optimizer:
        """Take steps with the gradients of these steps."""
        for step in steps:
            gradients = [self._values(shape, step + 1) for shape in _SHAPES]
            if cut:
                gradients = [piece for gradient in gradients for piece in _pieces(gradient)]
            for group in optimizer.param_groups:
                group["lr"] = self._settings.lr * group["lr_mult"] * (step + 1) / STEPS
            for parameter, gradient in zip(_parameters(optimizer), gradients, strict=True):
                parameter.grad = gradient.clone()
            with naming(self._member.module, "step"):
                optimizer.step()
        return optimizer

    def resumed(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return a new optimizer that has got what a checkpoint would hold of another."""
        found = self.start(weights=[parameter.detach() for parameter in _parameters(optimizer)])
        for group, saved in zip(found.param_groups, optimizer.param_groups, strict=True):
            group.update({key: copy.deepcopy(saved[key]) for key in self._member.group_state_keys if key in saved})
        for parameter, saved in zip(_parameters(found), _parameters(optimizer), strict=True):
            found.state[parameter] = {key: copy.deepcopy(value) for key, value in optimizer.state[saved].items()}
        return found

    def _values(self, shape: tuple[int, ...], step: int) -> torch.Tensor:
        places = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
        return torch.sin(1.7 * places + 2.9 * step + len(shape)).view(shape).to(self._device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the parameters in the order in which they were given; matrices have a group before vectors."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _pieces(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.reshape(-1).tensor_split(2)


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "lr")}


def _check_groups(member: Member, before: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> None:
    for old, group in zip(before, groups, strict=True):
        new = _without_parameters(group)
        for key in new.keys() | old.keys():
            if key in member.group_state_keys:
                continue
            if key not in old or key not in new or not _same(old[key], new[key]):
                kept = (*member.group_state_keys[1:], key)
                raise ConfigError(
                    f"{member} changes `{key}` of its parameter groups in a step, which its module does not declare, "
                    f"so a resume would lose it; write GROUP_STATE_KEYS = {kept!r} in {member.module.__name__}"
                )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _equal(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    pairs = zip(_parameters(one), _parameters(other), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def _agree(whole: torch.optim.Optimizer, cut: torch.optim.Optimizer) -> bool:
    """Return whether weights that were updated whole and in pieces agree up to rounding."""
    ours, theirs = (torch.cat([p.detach().view(-1) for p in _parameters(o)]) for o in (whole, cut))
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)
