"""The optimizer family: how gradients become updates, one module a member, found by `optimizer.name`.

A member is a module here, named by its file, or a module of the user's own, named by its dotted path. It provides:

    class Settings(Section): ...
        The member's own keys beside the common ones under `optimizer:`. Optional. A field `eps` is scaled for
        CompleteP and for `eps_calibration` before it reaches the groups; every other field is the member's own.
    STATE_KEYS: tuple[str, ...] = ("exp_avg",)
        Names of the float32 tensors of a parameter's shape that the optimizer keeps in `state[parameter]`, and `step`
        if it keeps a scalar there that counts steps. Left out where there are none.
    ROLE_STATE_KEYS: dict[str, tuple[str, ...]] = {"hidden": ("exp_avg", "step")}
        The part of STATE_KEYS that is kept for parameters of a role (`hidden` for the blocks' matrices, `embedding`,
        `head`, `norm` or `bias`), where it is not all of them. Checkpoints and estimates of memory follow it.
    ROLE_SETTINGS: dict[str, tuple[str, ...]] = {"hidden": ("momentum",)}
        Names of the member's own settings that decide the updates of a role, where it is not all of them; `--check`
        prints these, and `eps` only for roles that use it.
    GROUP_STATE_KEYS: tuple[str, ...] = ()
        Names of the values in `param_groups` that a step changes and a resume needs. `step` may be left out.
    ELEMENTWISE: bool = True
        Whether an element of a tensor is updated by that element's values alone. If not, the optimizer cannot be used
        where tensors are cut over ranks (`parallel.distributed_optimizer`, `parallel.tensor`), unless `GATHERS`.
    GATHERS: bool = False
        Whether it puts the pieces of cut tensors together itself, with `megadiff.optim.pieces`, as `muon` does.
    def build(groups, settings) -> torch.optim.Optimizer
        The optimizer over parameter groups, each with its `params`, `lr`, `weight_decay` and, if there is a setting
        `eps`, `eps`. Before every step each group's `lr` is set for that step.
    def initial_state(parameter, group) -> dict[str, Tensor]
        State of a parameter before its first step. Optional; zeros of the declared keys unless it is given.
    def kernel(optimizer) -> str
        Name of the kernel of an optimizer that was built, for the log. Optional.

At the start of a run the member takes a few steps on tiny tensors (`megadiff.optim.probe`), so that state that is not
declared, or that a checkpoint cannot hold, is refused before training. `megadiff.testing.check_optimizer` is the same
for a test suite, and more.

`load_member` finds a member and returns it as a `Member`, which knows the state that it keeps between steps. Neither
imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megadiff.config.registry import call, check_arguments
from megadiff.errors import ConfigError
from megadiff.optim.config import OPTIMIZERS, ROLES, OptimizerConfig

if TYPE_CHECKING:
    import torch


STEP = "step"
"""Name of the one scalar that may be kept: a count of steps, equal for all parameters."""


@dataclass(frozen=True)
class Member:
    """A member's module with what it declares."""

    name: str
    module: ModuleType
    state_keys: tuple[str, ...]
    """Names of the tensors of a parameter's shape that are kept for parameters, of any role."""
    keeps_step: bool
    """Whether a scalar `step` may be kept for each parameter."""
    group_state_keys: tuple[str, ...]
    """Names of the values in parameter groups that change from step to step, `step` among them."""
    is_elementwise: bool
    """Whether an element's update depends on that element's values alone."""
    gathers: bool = False
    """Whether a member that is not elementwise puts the pieces of cut tensors together itself."""
    role_state_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the tensors kept for parameters of roles that do not have all of `state_keys`."""
    role_settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the member's own settings that a role's updates use, for roles that do not use all of them."""

    @property
    def takes_pieces(self) -> bool:
        """Whether the member can be used where tensors are cut over ranks."""
        return self.is_elementwise or self.gathers

    def keys_of_role(self, role: str) -> tuple[str, ...]:
        """Return the names of the tensors that are kept for each parameter of a role."""
        return self.role_state_keys.get(role, self.state_keys)

    def keys_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        """Return the names of the tensors that are kept for a parameter, which is marked with its role."""
        if not self.role_state_keys:
            return self.state_keys
        from megadiff.optim.pieces import piece_of

        return self.keys_of_role(piece_of(parameter).role)

    def build(self, groups: list[dict[str, Any]], settings: OptimizerConfig) -> torch.optim.Optimizer:
        """Return the optimizer over these parameter groups."""
        return call(self.module, "build", groups, settings)

    def kernel(self, built: torch.optim.Optimizer) -> str:
        """Return the name of the update kernel, for the log."""
        if hasattr(self.module, "kernel"):
            return call(self.module, "kernel", built)
        return f"{type(built).__module__}.{type(built).__qualname__}"

    def initial_state(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter before its first step."""
        if hasattr(self.module, "initial_state"):
            return call(self.module, "initial_state", parameter, group)
        import torch

        state: dict[str, Any] = {STEP: torch.zeros(())} if self.keeps_step else {}
        for key in self.keys_of(parameter):
            state[key] = torch.zeros_like(parameter.data, dtype=torch.float32)
        return state

    def complete_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every parameter the state that it lacks: that of before the first step, and the others' `step`."""
        steps = [state[STEP] for state in optimizer.state.values() if STEP in state]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if any(key not in state for key in self.keys_of(parameter)) or (self.keeps_step and STEP not in state):
                    initial = self.initial_state(parameter, group)
                    if steps and STEP in initial:
                        initial[STEP].copy_(steps[0])
                    optimizer.state[parameter] = {**initial, **state}

    def check_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse state that a checkpoint would not hold.

        Raises:
            ConfigError: a parameter's state has a key that is not declared, or a tensor of another shape or type.
        """
        import torch

        for parameter, state in optimizer.state.items():
            declared = self.keys_of(parameter)
            extra = sorted(key for key in state if key not in declared and not (self.keeps_step and key == STEP))
            if extra:
                raise ConfigError(self._undeclared(parameter, extra))
            for key in declared:
                value = state.get(key)
                is_saved = isinstance(value, torch.Tensor) and value.shape == parameter.shape
                if key in state and not (is_saved and value.dtype == torch.float32):
                    raise ConfigError(
                        f"{self} keeps `{key}` for a parameter of shape {list(parameter.shape)} as "
                        f"{_described(value)}; a checkpoint holds float32 tensors of the parameter's own shape"
                    )

    def _undeclared(self, parameter: torch.Tensor, extra: list[str]) -> str:
        """Return the sentence about state of a parameter that is not declared."""
        kept = tuple(sorted({*self.keys_of(parameter), *extra, *((STEP,) if self.keeps_step else ())}))
        whose, constant = "each parameter", f"STATE_KEYS = {kept!r}"
        if self.role_state_keys:
            from megadiff.optim.pieces import piece_of

            role = piece_of(parameter).role
            if role in self.role_state_keys:
                whose, constant = f"parameters of the role `{role}`", f"ROLE_STATE_KEYS = {{{role!r}: {kept!r}}}"
        return (
            f"{self} keeps {_listed(extra)} for {whose}, which its module does not declare, so no checkpoint would "
            f"hold it; write {constant} in {self.module.__name__}"
        )

    def __str__(self) -> str:
        return f"the optimizer `{self.name}`"


def load_member(name: str) -> Member:
    """Return a member of the family by its name or dotted path.

    Raises:
        ConfigError: there is none, or its module does not follow the contract.
    """
    return member_of(OPTIMIZERS.member(name), name)


def member_of(module: ModuleType, name: str) -> Member:
    """Return the member that a module is.

    Raises:
        ConfigError: the module does not follow the contract.
    """
    if not callable(getattr(module, "build", None)):
        raise ConfigError(f"the optimizer `{name}` has no function `build(groups, settings)` in {module.__name__}")
    check_arguments(module, "build", [], None)
    state_keys = _names(module, name, "STATE_KEYS")
    group_keys = _names(module, name, "GROUP_STATE_KEYS")
    by_role = _names_by_role(module, name, "ROLE_STATE_KEYS")
    for role, keys in by_role.items():
        if unknown := [key for key in keys if key not in state_keys]:
            raise ConfigError(
                f"ROLE_STATE_KEYS of the optimizer `{name}` gives the role `{role}` {_listed(unknown)}, which "
                f"STATE_KEYS = {state_keys!r} lacks; STATE_KEYS names the state of all roles together"
            )
    return Member(
        name,
        module,
        tuple(key for key in state_keys if key != STEP),
        STEP in state_keys,
        (STEP, *(key for key in group_keys if key != STEP)),
        bool(getattr(module, "ELEMENTWISE", True)),
        bool(getattr(module, "GATHERS", False)),
        {role: tuple(key for key in keys if key != STEP) for role, keys in by_role.items()},
        _names_by_role(module, name, "ROLE_SETTINGS"),
    )


def _names(module: ModuleType, name: str, declared: str) -> tuple[str, ...]:
    found = getattr(module, declared, ())
    if isinstance(found, str) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{declared} of the optimizer `{name}` must be a tuple of names, found {found!r}")
    return tuple(found)


def _names_by_role(module: ModuleType, name: str, declared: str) -> dict[str, tuple[str, ...]]:
    found = getattr(module, declared, {})
    wanted = f"{declared} of the optimizer `{name}` must map roles ({', '.join(ROLES)}) to tuples of names"
    if not isinstance(found, Mapping) or not all(role in ROLES for role in found):
        raise ConfigError(f"{wanted}, found {found!r}")
    for keys in found.values():
        if isinstance(keys, str) or not all(isinstance(key, str) for key in keys):
            raise ConfigError(f"{wanted}, found {found!r}")
    return {role: tuple(keys) for role, keys in found.items()}


def _listed(keys: list[str]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is None:
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} of shape {list(shape)}"
