from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from megadiff.data.config import BatchSizes
from megadiff.errors import TrainingError
from megadiff.optim.config import WarmupStableDecay
from megadiff.parallel.topology import Topology
from megadiff.supervision.config import WatchdogConfig
from megadiff.supervision.launch import Launch
from megadiff.supervision.watchdog import Watchdog
from megadiff.train.config import HealthConfig
from megadiff.train.goodput import Goodput, GoodputConfig
from megadiff.train.health import Health
from megadiff.train.hooks import Hook
from megadiff.train.hooks.checkpoint import CheckpointHook
from megadiff.train.loop import AgreedStop, StepOutput, Trainer, TrainResult


class Recorder(Hook):
    """Keeps its calls."""

    def __init__(self, happened):
        self.happened = happened

    def open(self):
        self.happened.append("open")

    def __call__(self, info):
        self.happened.append((info.step, info.skipped))

    def close(self):
        self.happened.append("close")


def trainer_of(norms, *, first_step=0):
    """A run without requests to stop whose steps have these gradient norms; (trainer, what happened)."""
    happened = []
    answers = iter(norms)
    health = Health(HealthConfig(), sizes=BatchSizes(8))

    def step(microbatches, lr, mark, is_stop_requested):
        happened.append((microbatches, lr))
        norm = next(answers)
        return StepOutput(torch.zeros(1), norm, health.check(1.0, norm))

    return Trainer(
        step=step,
        health=health,
        first_step=first_step,
        steps=first_step + len(norms),
        sizes=BatchSizes(8),
        sequences_at_once=4,
        schedule=WarmupStableDecay(steps=10, warmup_steps=4, decay_steps=0, decay_shape="sqrt"),
        peak_lr=1.0,
        microbatches=iter(range(100)),
        hooks=[Recorder(happened)],
        checkpoint=cast(CheckpointHook, None),
        stop=AgreedStop(None, cast(Topology, None)),
        watchdog=Watchdog(WatchdogConfig(enabled=False), Launch.from_env(Path("unused"), rank=0, world_size=1)),
        goodput=Goodput(None, GoodputConfig(), save_every=100),
        closing=[lambda: happened.append("closed")],
    ), happened


def test_a_step_takes_its_microbatches_its_rate_and_then_the_hooks():
    trainer, happened = trainer_of([1.0, 1.0], first_step=2)
    assert trainer.train() == TrainResult(4, None)
    assert happened == ["open", ([0, 1], 0.5), (3, None), ([2, 3], 0.75), (4, None), "close", "closed"]


@pytest.mark.parametrize("norm", [float("nan"), float("inf")])
def test_a_skipped_step_advances_data_and_schedule_and_informs_hooks(norm):
    trainer, happened = trainer_of([1.0, norm, 1.0])
    trainer.train()
    steps = [([0, 1], 0.0), (1, None), ([2, 3], 0.25), (2, "non_finite"), ([4, 5], 0.5), (3, None)]
    assert happened == ["open", *steps, "close", "closed"]


def test_a_run_that_health_ends_closes_its_files_and_calls_no_more_hooks():
    trainer, happened = trainer_of([1.0, *[float("nan")] * 3, 1.0])
    with pytest.raises(TrainingError, match=r"step 4: .* 3 consecutive steps .* Their samples are 8 to 31;"):
        trainer.train()
    assert happened[-4:] == [(3, "non_finite"), ([6, 7], 0.75), "close", "closed"]
