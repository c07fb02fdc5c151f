from __future__ import annotations

import math

import pytest
import torch

from megadiff.data.batch_sizes import BatchSizes
from megadiff.errors import TrainingError
from megadiff.optim.schedule import WarmupStableDecay
from megadiff.train.loop import Run, train


def run_of(norms, *, first_step=0):
    """A run whose steps answer with these gradient norms; (run, what happened)."""
    happened = []

    def step(microbatches, lr):
        happened.append((microbatches, lr))
        return torch.zeros(1), norms[len([h for h in happened if isinstance(h, tuple)]) - 1]

    return Run(
        step=step,
        first_step=first_step,
        steps=first_step + len(norms),
        sizes=BatchSizes(8),
        rows_at_once=4,
        schedule=WarmupStableDecay(steps=10, warmup_steps=4, cooldown_steps=0, shape="sqrt"),
        peak_lr=1.0,
        rows=iter(range(100)),
        hooks=[lambda result: happened.append(result.step)],
        before=lambda: happened.append("before"),
        close=lambda: happened.append("close"),
    ), happened


def test_a_step_takes_its_microbatches_its_rate_and_then_the_hooks():
    run, happened = run_of([1.0, 1.0], first_step=2)
    train(run)
    assert happened == ["before", ([0, 1], 0.5), 3, ([2, 3], 0.75), 4, "close"]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_with_its_samples(norm):
    run, happened = run_of([1.0, norm, 1.0])
    with pytest.raises(TrainingError, match=rf"step 2: the gradient norm is {norm}; no update .* samples are 8 to 15;"):
        train(run)
    assert happened[-1] == "close"
    assert 2 not in happened
