"""Parameter groups by role: which learning rate, decay and epsilon each parameter gets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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


def effective_eps(settings: OptimizerConfig, *, hidden: int, layers: int) -> float:
    """Epsilon of every group: the setting, over hidden x layers under `completep`."""
    return settings.eps / (hidden * layers) if settings.parametrisation == "completep" else settings.eps


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerConfig, *, hidden: int, layers: int
) -> list[dict[str, Any]]:
    """Sort parameters into groups, the same list of groups on every rank even where a group is empty.

    Groups are told apart by (lr_mult, wd_mult), which is how megatron-core matches them to a checkpoint
    (`param_group_identifier_keys` in optimizer/optimizer.py): roles with equal rules share a group.

    Args:
        parameters: (role, parameter) pairs of this rank.
    """
    by_rule: dict[Rule, list[torch.nn.Parameter]] = {rule: [] for rule in rules(settings, hidden=hidden).values()}
    table = rules(settings, hidden=hidden)
    for role, parameter in parameters:
        by_rule[table[role]].append(parameter)
    return [
        {
            "params": members,
            "lr": settings.lr * rule.lr_mult,
            "weight_decay": settings.weight_decay * rule.wd_mult,
            "eps": effective_eps(settings, hidden=hidden, layers=layers),
            "lr_mult": rule.lr_mult,
            "wd_mult": rule.wd_mult,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
        }
        for rule, members in by_rule.items()
    ]
