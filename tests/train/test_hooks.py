from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megadiff.parallel.row_report import SIZE
from megadiff.platform.machine import detect
from megadiff.train.hooks import Evaluate, Log, Save, StepResult
from megadiff.train.metrics import MetricsFile, read_metrics


def result(step, seconds=0.5):
    return StepResult(step, torch.arange(1.0, SIZE + 1, dtype=torch.float64), 1e-3, 2.0, seconds)


class Replicas:
    """A topology of two replicas that hold the same sums."""

    layout = SimpleNamespace(world_size=2)

    @staticmethod
    def sum_over_run(values):
        return 2 * values


def log_hook(path, every, steps):
    return Log(
        every=every,
        steps=steps,
        tokens_before=lambda step: 100 * step,
        flops_per_token=1e6,
        topology=Replicas(),
        platform=detect("cpu"),
        metrics=MetricsFile(path, after_step=0),
    )


@pytest.mark.parametrize(("every", "steps", "due"), [(3, 7, [1, 3, 6, 7]), (1, 3, [1, 2, 3]), (10, 4, [1, 4])])
def test_the_log_speaks_at_the_first_step_every_few_and_the_last(tmp_path, every, steps, due):
    hook = log_hook(tmp_path / "m.jsonl", every, steps)
    for step in range(1, steps + 1):
        hook(result(step))
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == due


def test_a_line_has_the_promised_keys_means_over_all_replicas_and_speed_since_the_last_line(tmp_path):
    hook = log_hook(tmp_path / "m.jsonl", 2, 4)
    for step in range(1, 5):
        hook(result(step, seconds=0.25))
    line = read_metrics(tmp_path / "m.jsonl")[1]
    promised = (
        "step tokens loss elbo kl is mean_weight lr grad_norm tokens_per_s tflops_per_device mfu peak_bytes elapsed_s"
    )
    assert set(promised.split()) <= set(line)
    assert line["loss"] == pytest.approx(2 * 1.0 / (2 * 6.0)), "sums are added up before they are divided"
    assert (line["tokens"], line["noisy_tokens"], line["mfu"]) == (200, 12, None)
    assert line["tokens_per_s"] == pytest.approx(400.0)
    assert line["tflops_per_device"] == pytest.approx(400.0 * 1e6 / 2 / 1e12)


@dataclass
class Found:
    elbo: float = 3.0

    def as_metrics(self):
        return {"eval_elbo": self.elbo}

    def describe(self):
        return "held-out"


@pytest.mark.parametrize(("every", "due"), [(0, [5]), (2, [2, 4, 5]), (5, [5])])
def test_evaluation_is_due_every_few_steps_and_at_the_last(tmp_path, every, due):
    hook = Evaluate(every, 5, Found, MetricsFile(tmp_path / "m.jsonl", after_step=0))
    for step in range(1, 6):
        hook(result(step))
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": step, "eval_elbo": 3.0} for step in due]


@pytest.mark.parametrize(("every", "due"), [(2, [2, 4, 5]), (5, [5]), (100, [5])])
def test_a_checkpoint_is_due_every_few_steps_and_at_the_last(every, due):
    saved = []
    hook = Save(every, 5, lambda step: saved.append(step) or Path("x"), None)
    for step in range(1, 6):
        hook(result(step))
    assert saved == due
