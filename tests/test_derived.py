"""The numbers that are printed before training, against the model that is built."""

from __future__ import annotations

import re

import pytest

from megadiff.model import cost
from megadiff.platform.quiet import quiet
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, toy_config

with quiet():
    from megadiff.derived import learning_rates
    from megadiff.model.initialisation import role_of
    from megadiff.optim.groups import parameter_groups
    from tests.support.toy_model import build_on_rank

ROLES = {"block matrices": "bulk", "embedding": "embedding", "output head": "head", "norm gains": "norm"}
ROLES |= {"biases": "bias"}
LINE = re.compile(r"learning rate +(.*), ([\d,]+) parameters: peak (\S+) \((.*)\), weight decay (\S+), eps (\S+)")


def built_groups(config):
    """Return, for each role of a model that is really built: parameters, rate, decay and eps of its group."""
    chunks, _ = build_on_rank(config.model)
    named = [(role_of(name), parameter) for name, parameter in chunks[0].named_parameters()]
    groups = parameter_groups(named, config.optimizer, config.optimizer_scale)
    found: dict[str, list[float]] = {}
    for role, parameter in named:
        (group,) = [g for g in groups if any(parameter is member for member in g["params"])]
        counted = found.setdefault(role, [0, group["lr"], group["weight_decay"], group["eps"]])
        counted[0] += parameter.numel()
    return found


@pytest.mark.parametrize("parametrisation", ["standard", "completep"])
def test_each_role_has_a_line_with_the_numbers_its_parameters_are_updated_with(toy_corpus, tmp_path, parametrisation):
    changes = {f"model__{key}": value for key, value in GIDD_BLOCK.items()}
    optimizer = {"lr": 0.3, "weight_decay": 0.01, "eps": 1e-6, "parametrisation": parametrisation}
    changes |= {f"optimizer__{key}": value for key, value in optimizer.items()}
    config = toy_config(toy_corpus, tmp_path, model__vocab_multiple=1, **changes)
    (built,) = on_ranks(1, built_groups, config)
    lines = learning_rates(config, cost.parameters(config.shape(vocab_size=260)))
    shown = {ROLES[m[1]]: m for line in lines if (m := LINE.fullmatch(line))}
    assert set(shown) == set(built)
    for role, (count, lr, decay, eps) in built.items():
        line = shown[role]
        assert int(line[2].replace(",", "")) == count
        assert float(line[3]) == pytest.approx(lr, rel=1e-3)
        assert (float(line[5]), float(line[6])) == (pytest.approx(decay, rel=1e-3), pytest.approx(eps, rel=1e-2))
    assert any("CompleteP's base rate" in line for line in lines) == (parametrisation == "completep")


def test_the_factor_between_the_setting_and_the_rate_is_shown(toy_corpus, tmp_path):
    config = toy_config(toy_corpus, tmp_path, optimizer__lr=0.5, optimizer__parametrisation="completep")
    text = "\n".join(learning_rates(config, cost.parameters(config.shape(vocab_size=260))))
    assert "block matrices, 49,152 parameters: peak 0.01562 (0.5 x 1/32)" in text
    assert "peak 0.01 (0.5 x 0.02)" in text
    assert "biases" not in text
