"""Parameter groups by role: which learning rate, decay and epsilon each parameter gets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megadiff.optim.config import OptimizerConfig


@dataclass(frozen=True)
class Rule:
    """What a role's parameters get, relative to the settings."""

    lr_mult: float
    wd_mult: float


def rules(settings: OptimizerConfig, *, hidden: int) -> dict[str, Rule]:
    """The rule of each role.

    Source of `completep`: arXiv:2512.10858, CompleteP table (bulk eta / d, decay x d so that lr x decay is free of
    the width; every other role 0.02 eta and no decay).
    """
    if settings.parametrisation == "completep":
        side = Rule(0.02, 0.0)
        return {"bulk": Rule(1.0 / hidden, float(hidden)), "embedding": side, "head": side, "norm": side, "bias": side}
    matrix, vector = Rule(1.0, 1.0), Rule(1.0, 0.0)
    return {"bulk": matrix, "embedding": matrix, "head": matrix, "norm": vector, "bias": vector}


@dataclass(frozen=True)
class Scale:
    """What epsilon depends on beside the settings."""

    hidden: int
    layers: int
    tokens_per_step: int
    """Tokens a gradient sums over; all of them, noise-free ones too."""
    reduction: Literal["sum", "mean"]
    """Of the loss the gradients are of."""


def effective_eps(settings: OptimizerConfig, scale: Scale) -> float:
    """Epsilon of every group.

    The setting; over hidden x layers under `completep`; and brought to the loss's reduction from the one it was
    calibrated for. Source: arXiv:2512.10858's code (eps = 1e-8 / (d L) with summed losses).
    """
    eps = settings.eps / (scale.hidden * scale.layers) if settings.parametrisation == "completep" else settings.eps
    if settings.eps_calibration in (None, scale.reduction):
        return eps
    return eps / scale.tokens_per_step if scale.reduction == "mean" else eps * scale.tokens_per_step


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerConfig, scale: Scale
) -> list[dict[str, Any]]:
    """Sort parameters into groups, the same list of groups on every rank even where a group is empty.

    Groups are told apart by (lr_mult, wd_mult), which is how megatron-core matches them to a checkpoint
    (`param_group_identifier_keys` in optimizer/optimizer.py): roles with equal rules share a group.

    Args:
        parameters: (role, parameter) pairs of this rank.
    """
    by_rule: dict[Rule, list[torch.nn.Parameter]] = {rule: [] for rule in rules(settings, hidden=scale.hidden).values()}
    table = rules(settings, hidden=scale.hidden)
    for role, parameter in parameters:
        by_rule[table[role]].append(parameter)
    return [
        {
            "params": members,
            "lr": settings.lr * rule.lr_mult,
            "weight_decay": settings.weight_decay * rule.wd_mult,
            "eps": effective_eps(settings, scale),
            "lr_mult": rule.lr_mult,
            "wd_mult": rule.wd_mult,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
        }
        for rule, members in by_rule.items()
    ]
