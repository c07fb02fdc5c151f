"""Parameter groups by role: which learning rate, decay and epsilon each parameter gets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megadiff.optim.config import OptimizerConfig
from megadiff.optim.pieces import mark_whole
from megadiff.optim.rules import Rule, Scale, effective_eps, rules


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], settings: OptimizerConfig, scale: Scale
) -> list[dict[str, Any]]:
    """Return parameter groups, the same list of groups on every rank even where a group is empty.

    Groups are distinguished by (lr_mult, wd_mult), which is how megatron-core matches them to a checkpoint
    (`param_group_identifier_keys` in optimizer/optimizer.py): roles with equal rules share a group. A group has an
    `eps` if the optimizer has such a setting. Each parameter is marked with its role (`megadiff.optim.pieces`).

    Args:
        parameters: (role, parameter) pairs of this rank.
    """
    table = rules(settings, hidden=scale.hidden)
    by_rule: dict[Rule, list[torch.nn.Parameter]] = {rule: [] for rule in table.values()}
    eps = effective_eps(settings, scale)
    for role, parameter in parameters:
        mark_whole(role, parameter)
        by_rule[table[role]].append(parameter)
    return [
        {
            "params": members,
            "lr": settings.lr * rule.lr_mult,
            "weight_decay": settings.weight_decay * rule.wd_mult,
            **({} if eps is None else {"eps": eps}),
            "lr_mult": rule.lr_mult,
            "wd_mult": rule.wd_mult,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
        }
        for rule, members in by_rule.items()
    ]
