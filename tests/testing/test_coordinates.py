"""The coordinate check passes with CompleteP whole and fails when any one of its rules is removed."""

from __future__ import annotations

import pytest

from megadiff.scaling.optimum import BANDS, RULES, sizes
from tests.support.commands import REPOSITORY
from tests.support.ranks import on_ranks
from tests.support.runs import platform_on_rank

GRID = sizes([128, 256, 512], [2, 4, 8], "cross")
WIDTHS, DEPTHS = sizes([64, 128, 256], [2], "cross"), sizes([64], [2, 4, 8], "cross")
"""Small sizes along one axis, which show the absence of a rule at a fifth of the cost."""
SMALLEST = (64, 2)

TELLS = {
    # rule: a statistic and the axis along which it gives the rule's absence away
    "residual": "change of stream goes with depth^+",
    "head": "logits, step 1 goes with width^+",
    "hidden_init": "stream, start goes with width^+",
    "embed_init": "embedding, start goes with width^-",
    "zero_head": "logits before the first step have size",
    "hidden_lr": "change of stream goes with width^+",
    "embed_lr": "change of embedding goes with width^-",
    "head_lr": "logits, step 1 goes with width^-",
    "gain_lr": "change of gains goes with width^-",
    "bias_lr": "change of biases goes with width^-",
    "eps": "eps / gradient goes with width^+",
    "decay": "decay of hidden matrices goes with width^-",
}


@pytest.fixture(scope="module")
def checked():
    """`{rule removed, or sizes with all rules: (statistics, sentences)}`, all in one process."""
    return on_ranks(1, _check_on_rank, timeout_s=1200)[0]


def _check_on_rank():
    from megadiff.testing.coordinates import check

    platform_on_rank()
    preset = REPOSITORY / "examples/presets/gidd.yaml"
    found = {"whole": check(GRID, preset), "widths": check(WIDTHS, preset), "depths": check(DEPTHS, preset)}
    return {**found, **{rule: check(_sizes(rule), preset, without=rule) for rule in RULES}}


def _sizes(rule):
    """Return the sizes along the axis that gives the absence of a rule away."""
    return DEPTHS if "depth^" in TELLS[rule] else WIDTHS


def test_completep_keeps_every_promise(checked):
    measured, broken = checked["whole"]
    assert broken == []
    assert list(measured) == GRID
    assert {band.statistic for band in BANDS} <= set(measured[128, 2])
    assert all(found["logits, start"] == 0 for found in measured.values())


@pytest.mark.parametrize("sizes", ["widths", "depths"])
def test_the_small_sizes_break_nothing_with_all_rules(checked, sizes):
    assert checked[sizes][1] == []


def test_every_rule_has_a_tell():
    assert set(TELLS) == set(RULES)


@pytest.mark.parametrize("rule", TELLS)
def test_without_one_rule_the_check_fails_and_says_why(checked, rule):
    _, broken = checked[rule]
    assert any(sentence.startswith(TELLS[rule]) for sentence in broken), broken


@pytest.mark.parametrize("rule", sorted(set(TELLS) - {"zero_head"}))
def test_the_smallest_model_is_the_same_without_a_rule(checked, rule):
    """A rule is kept at its value for the smallest size, so what gives it away is scaling and nothing else.

    A head that starts at random differs at every size.
    """
    assert checked[rule][0][SMALLEST] == pytest.approx(checked["widths"][0][SMALLEST], rel=1e-3)


MODERN = ["model.kv_heads=1", "model.mlp=swiglu", "model.ffn_hidden=null", "model.qkv_bias=true"]


def _check_modern_on_rank():
    from megadiff.testing.coordinates import check

    platform_on_rank()
    preset = REPOSITORY / "examples/presets/gidd.yaml"
    found = {"whole": check(GRID, preset, overrides=MODERN)[1]}
    found |= {axis: check(sizes, preset, overrides=MODERN)[1] for axis, sizes in (("w", WIDTHS), ("d", DEPTHS))}
    rules = ("residual", "hidden_init", "hidden_lr")
    return found, {rule: check(_sizes(rule), preset, overrides=MODERN, without=rule)[1] for rule in rules}


def test_shared_keys_and_gates_follow_the_rules_of_block_matrices():
    kept, removed = on_ranks(1, _check_modern_on_rank, timeout_s=1200)[0]
    assert kept == {"whole": [], "w": [], "d": []}
    for rule, broken in removed.items():
        assert any(sentence.startswith(TELLS[rule]) for sentence in broken), broken


def _check_muon_on_rank():
    from megadiff.optim.muon import Muon
    from megadiff.testing.coordinates import check

    platform_on_rank()
    grid, preset = sizes([128, 256, 512], [2], "cross"), REPOSITORY / "examples/presets/gidd.yaml"
    overrides = ["optimizer.name=muon", "optimizer.update_scale=2"]  # so that the blocks outweigh the embedding
    found = [check(sizes, preset, overrides=overrides)[1] for sizes in (grid, WIDTHS)]
    Muon._scale = lambda _, rows, columns: 30.0 * max(rows, columns) ** 0.5  # type: ignore[method-assign]
    return [*found, check(WIDTHS, preset, overrides=overrides)[1]]


def test_muon_keeps_them_too_and_not_with_updates_of_one_size():
    whole, small, sized = on_ranks(1, _check_muon_on_rank, timeout_s=1200)[0]
    assert whole == []
    assert small == []
    assert any(sentence.startswith("change of stream goes with width^-") for sentence in sized), sized


def test_a_cross_holds_one_line_each_and_a_full_grid_all_pairs():
    assert GRID == [(128, 2), (128, 4), (128, 8), (256, 2), (512, 2)]
    assert len(sizes([128, 256], [2, 4, 8], "full")) == 6
