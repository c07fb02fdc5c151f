"""Declarations of a member of the optimizer family by role, and the sentences that refuse wrong ones."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from megadiff.errors import ConfigError
from megadiff.optim.members import Member, member_of
from megadiff.optim.pieces import mark_whole


def _member(**declared: Any) -> Member:
    module = ModuleType("theirs.own")
    module.build = lambda groups, settings: torch.optim.SGD(groups)  # type: ignore[attr-defined]
    for name, value in declared.items():
        setattr(module, name, value)
    return member_of(module, "theirs.own")


BOTH = {"STATE_KEYS": ("exp_avg", "exp_avg_sq", "step"), "ROLE_STATE_KEYS": {"hidden": ("exp_avg", "step")}}


def _optimizer(*roles: str) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in roles]
    for role, parameter in zip(roles, parameters, strict=True):
        mark_whole(role, parameter)
    return torch.optim.SGD(parameters)


def test_state_is_completed_by_role() -> None:
    member, optimizer = _member(**BOTH), _optimizer("hidden", "embedding")
    matrix, table = optimizer.param_groups[0]["params"]
    optimizer.state[table] = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}
    member.complete_state(optimizer)
    assert sorted(optimizer.state[matrix]) == ["exp_avg", "step"]
    assert sorted(optimizer.state[table]) == ["exp_avg", "exp_avg_sq", "step"]
    assert float(optimizer.state[matrix]["step"]) == 3, "all parameters have taken as many steps"
    assert float(optimizer.state[table]["exp_avg"].sum()) == 6
    member.check_state(optimizer)


@pytest.mark.parametrize(
    ("role", "sentence"),
    [
        (
            "hidden",
            "the optimizer `theirs.own` keeps `exp_avg_sq` for parameters of the role `hidden`, which its module does "
            "not declare, so no checkpoint would hold it; write ROLE_STATE_KEYS = {'hidden': ('exp_avg', 'exp_avg_sq', "
            "'step')} in theirs.own",
        ),
        (
            "norm",
            "the optimizer `theirs.own` keeps `n` for each parameter, which its module does not declare, so no "
            "checkpoint would hold it; write STATE_KEYS = ('exp_avg', 'exp_avg_sq', 'n', 'step') in theirs.own",
        ),
    ],
)
def test_state_that_a_role_does_not_declare_is_refused(role: str, sentence: str) -> None:
    member, optimizer = _member(**BOTH), _optimizer(role)
    (parameter,) = optimizer.param_groups[0]["params"]
    optimizer.state[parameter] = {"exp_avg_sq" if role == "hidden" else "n": torch.zeros(2, 3)}
    with pytest.raises(ConfigError) as refused:
        member.check_state(optimizer)
    assert str(refused.value) == sentence


WRONG = {
    "a role that is none": (
        {**BOTH, "ROLE_STATE_KEYS": {"matrix": ("exp_avg",)}},
        r"ROLE_STATE_KEYS of the optimizer `theirs\.own` must map roles \(hidden, embedding, head, norm, bias\) to",
    ),
    "a name in the place of a tuple": (
        {**BOTH, "ROLE_STATE_KEYS": {"hidden": "exp_avg"}},
        r"must map roles .* to tuples of names, found \{'hidden': 'exp_avg'\}",
    ),
    "no mapping": ({**BOTH, "ROLE_SETTINGS": ("momentum",)}, r"ROLE_SETTINGS of .* found \('momentum',\)"),
    "a key of no role": (
        {"STATE_KEYS": ("exp_avg",), "ROLE_STATE_KEYS": {"hidden": ("exp_avg", "buffer")}},
        r"gives the role `hidden` `buffer`, which STATE_KEYS = \('exp_avg',\) lacks",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_declaration_is_one_sentence(case: str) -> None:
    declared, sentence = WRONG[case]
    with pytest.raises(ConfigError, match=sentence):
        _member(**declared)
