from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from megadiff.data.batch_sizes import BatchSizes
from megadiff.errors import TrainingError
from megadiff.optim.schedule import WarmupStableDecay
from megadiff.parallel.topology import Topology
from megadiff.supervision.config import WatchdogConfig
from megadiff.supervision.launch import Launch
from megadiff.supervision.watchdog import Watchdog
from megadiff.train.config import HealthConfig
from megadiff.train.goodput import Goodput, GoodputConfig
from megadiff.train.health import Health
from megadiff.train.loop import Ending, Run, train
from megadiff.train.saving import Saves
from megadiff.train.step import Taken
from megadiff.train.stopping import AgreedStop


class Hook:
    """Keeps what it is told."""

    section = "step"

    def __init__(self, happened):
        self.happened = happened

    def __call__(self, result):
        self.happened.append((result.step, result.skip))


def run_of(norms, *, first_step=0):
    """A run that nobody asks to stop, whose steps answer with these gradient norms; (run, what happened)."""
    happened = []
    answers = iter(norms)
    health = Health(HealthConfig(), sizes=BatchSizes(8))

    def step(microbatches, lr, mark):
        happened.append((microbatches, lr))
        norm = next(answers)
        return Taken(torch.zeros(1), norm, health.judge(1.0, norm))

    return Run(
        step=step,
        health=health,
        first_step=first_step,
        steps=first_step + len(norms),
        sizes=BatchSizes(8),
        rows_at_once=4,
        schedule=WarmupStableDecay(steps=10, warmup_steps=4, cooldown_steps=0, shape="sqrt"),
        peak_lr=1.0,
        rows=iter(range(100)),
        hooks=[Hook(happened)],
        saves=cast(Saves, None),
        stop=AgreedStop(None, cast(Topology, None)),
        watchdog=Watchdog(WatchdogConfig(enabled=False), Launch.of(Path("unused"), rank=0, world_size=1)),
        goodput=Goodput(None, GoodputConfig(), save_every=100),
        before=[lambda: happened.append("before")],
        ends=[lambda: happened.append("close")],
    ), happened


def test_a_step_takes_its_microbatches_its_rate_and_then_the_hooks():
    run, happened = run_of([1.0, 1.0], first_step=2)
    assert train(run) == Ending(4, None)
    assert happened == ["before", ([0, 1], 0.5), (3, None), ([2, 3], 0.75), (4, None), "close"]


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_skipped_step_counts_data_and_schedule_go_on_and_hooks_learn_of_it(norm):
    run, happened = run_of([1.0, norm, 1.0])
    train(run)
    steps = [([0, 1], 0.0), (1, None), ([2, 3], 0.25), (2, "non_finite"), ([4, 5], 0.5), (3, None)]
    assert happened == ["before", *steps, "close"]


def test_a_run_that_health_ends_closes_its_files_and_calls_no_more_hooks():
    run, happened = run_of([1.0, *[float("nan")] * 3, 1.0])
    with pytest.raises(TrainingError, match=r"step 4: .* 3 steps in a row .* Their samples are 8 to 31;"):
        train(run)
    assert happened[-3:] == [(3, "non_finite"), ([6, 7], 0.75), "close"]
