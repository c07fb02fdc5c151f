"""When the bound is measured, and the line it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from megadiff.metric_lines import read_metrics
from megadiff.scaling.paired import PerSequence
from megadiff.train.config import GoodputConfig
from megadiff.train.goodput import Goodput
from megadiff.train.hooks import MetricSinks
from megadiff.train.hooks.metrics_file import MetricsFile
from megadiff.train.hooks.validation import ValidationHook


@dataclass
class Found:
    elbo: float = 3.0
    per_sequence = PerSequence("rows", None, (3.0, 3.0))

    def as_metrics(self):
        return {"eval_elbo": self.elbo}

    def describe(self):
        return "held-out"


@pytest.mark.parametrize(
    ("every", "first_step", "due"), [(0, 0, [0, 5]), (2, 0, [0, 2, 4, 5]), (5, 0, [0, 5]), (2, 3, [4, 5])]
)
def test_the_bound_is_measured_before_during_and_after_training(tmp_path, every, first_step, due):
    sinks = MetricSinks([MetricsFile(tmp_path / "m.jsonl", after_step=0)])
    goodput = Goodput(None, GoodputConfig(), save_every=5)
    hook = ValidationHook(
        every=every,
        steps=5,
        first_step=first_step,
        evaluate=Found,
        sinks=sinks,
        goodput=goodput,
        baselines={"eval_unigram": 4.0},
    )
    hook.open()
    for step in range(first_step + 1, 6):
        hook(SimpleNamespace(step=step))
    wanted = [{"step": step, "eval_elbo": 3.0, "eval_unigram": 4.0} for step in due]
    assert read_metrics(tmp_path / "m.jsonl") == wanted
