"""The learning-rate schedule against the values of the reference implementation."""

from __future__ import annotations

import pytest

from megadiff.errors import ConfigError
from megadiff.optim.config import WarmupStableDecay, resolve_decay_steps


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.0),
        (50, 0.5),
        (99, 0.99),
        (100, 1.0),
        (500, 1.0),
        (800, 1.0),
        (801, 0.929289),
        (810, 0.776393),
        (850, 0.5),
        (900, 0.292893),
        (950, 0.133975),
        (999, 0.002503),
        (1000, 0.0),
        (2000, 0.0),
    ],
)
def test_the_square_root_cooldown_has_the_reference_values(step, factor):
    """T = 1000, W = 100, C = 200, from the released code's schedule."""
    assert WarmupStableDecay(1000, 100, 200, "sqrt").factor(step) == pytest.approx(factor, abs=5e-7)


@pytest.mark.parametrize(("shape", "at_850", "at_900"), [("linear", 0.75, 0.5), ("cosine", 0.8535534, 0.5)])
def test_other_shapes_fall_from_one_to_zero(shape, at_850, at_900):
    schedule = WarmupStableDecay(1000, 100, 200, shape)
    assert [schedule.factor(step) for step in (800, 850, 900, 1000)] == pytest.approx([1, at_850, at_900, 0])


@pytest.mark.parametrize("shape", ["sqrt", "linear", "cosine"])
def test_it_never_leaves_zero_to_one_and_never_rises_after_warm_up(shape):
    schedule = WarmupStableDecay(97, 13, 84, shape)
    factors = [schedule.factor(step) for step in range(120)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[:14] == sorted(factors[:14])
    assert factors[13:] == sorted(factors[13:], reverse=True)


def test_without_warm_up_and_cooldown_the_rate_is_constant():
    assert {WarmupStableDecay(10, 0, 0).factor(step) for step in range(20)} == {1.0}


def test_a_schedule_of_warm_up_and_cooldown_alone_peaks_once():
    schedule = WarmupStableDecay(10, 5, 5, "linear")
    assert [schedule.factor(step) for step in range(10)] == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2]
    )


@pytest.mark.parametrize(
    ("cooldown", "steps", "resolved"), [(0, 100, 0), (0.2, 1000, 200), (0.1, 37, 4), (1, 100, 1), (250.0, 1000, 250)]
)
def test_a_fraction_below_one_is_a_share_of_the_run(cooldown, steps, resolved):
    assert resolve_decay_steps(cooldown, steps) == resolved


@pytest.mark.parametrize(
    ("cooldown", "sentence"),
    [
        (-1, "a cooldown is a count of steps or a fraction below 1, found -1"),
        (float("nan"), "a cooldown is a count of steps or a fraction below 1, found nan"),
        (float("inf"), "a cooldown is a count of steps or a fraction below 1, found inf"),
        (1.5, "a cooldown of 1 or more is a whole count of steps, found 1.5"),
    ],
)
def test_a_cooldown_that_is_neither_is_refused(cooldown, sentence):
    with pytest.raises(ConfigError) as caught:
        resolve_decay_steps(cooldown, 100)
    assert str(caught.value) == sentence


def test_warm_up_and_cooldown_must_fit_into_the_run():
    with pytest.raises(ConfigError) as caught:
        WarmupStableDecay(100, 60, 50)
    assert str(caught.value) == (
        "warm-up (60 steps) and cooldown (50 steps) do not fit into a run of 100 steps; "
        "shorten one of them or train longer"
    )
    with pytest.raises(ConfigError, match="counts steps from 0, found steps 10, warmup_steps -1, decay_steps 0"):
        WarmupStableDecay(10, -1, 0)
    with pytest.raises(ValueError, match="steps are counted from 0, got -1"):
        WarmupStableDecay(10).factor(-1)
