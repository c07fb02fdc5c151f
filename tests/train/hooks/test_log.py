"""The training line, and the console's line that is made from it."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from megadiff.metric_lines import read_metrics
from megadiff.parallel.step_metrics import SIZE
from megadiff.platform.machine import detect
from megadiff.train.hooks import MetricSinks, StepInfo
from megadiff.train.hooks.log import Console, LogHook
from megadiff.train.hooks.metrics_file import MetricsFile


def info(step, seconds=0.5, skipped=None, **changes):
    sums = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
    for place, value in changes.items():
        sums[int(place.removeprefix("at_"))] = value
    return StepInfo(step, sums, 1e-3, 2.0, seconds, skipped)


def log_hooks(path, every, steps, *, tokens_before=lambda step: 100 * step, **options):
    """Console and log, called in this order as in a run; a function of a step's info."""
    console = Console(steps, tokens_before)
    log = LogHook(
        every=every,
        steps=steps,
        tokens_before=tokens_before,
        flops_per_token=1e6,
        flops_by_count={"deepseek": 2e6, "full": 3e6},
        executed_flops=lambda sums: 1e5 * sums[5],
        world_size=2,
        platform=detect("cpu"),
        sinks=MetricSinks([MetricsFile(path, after_step=0), console]),
        **options,
    )

    def call(info):
        console(info)
        log(info)

    return call


@pytest.mark.parametrize(("every", "steps", "due"), [(3, 7, [1, 3, 6, 7]), (1, 3, [1, 2, 3]), (10, 4, [1, 4])])
def test_a_line_is_written_at_the_first_step_every_few_and_the_last(tmp_path, every, steps, due):
    hook = log_hooks(tmp_path / "m.jsonl", every, steps)
    for step in range(1, steps + 1):
        hook(info(step))
    assert [line["step"] for line in read_metrics(tmp_path / "m.jsonl")] == due


def test_a_line_has_the_promised_keys_token_means_and_recent_speed(tmp_path):
    hook = log_hooks(tmp_path / "m.jsonl", 2, 4)
    for step in range(1, 5):
        hook(info(step, seconds=0.25))
    line = read_metrics(tmp_path / "m.jsonl")[1]
    promised = (
        "step tokens loss elbo kl itakura_saito weight lr grad_norm tokens_per_s tflops_per_device mfu peak_bytes "
        "elapsed_s"
    )
    assert set(promised.split()) <= set(line)
    assert line["loss"] == pytest.approx(1.0 / 6.0)
    assert (line["tokens"], line["noisy_tokens"], line["mfu"]) == (200, 6, None)
    assert "skipped" not in line
    assert line["flops"] == {"deepseek": 200 * 2e6, "full": 200 * 3e6}
    assert line["tokens_per_s"] == pytest.approx(400.0)
    assert line["tflops_per_device"] == pytest.approx(400.0 * 1e6 / 2 / 1e12)
    # Step 2 alone, since step 1 has a line of its own: 6 units in 0.25 s.
    assert line["executed_tflops_per_device"] == pytest.approx(6 * 1e5 / 0.25 / 2 / 1e12)
    assert line["hfu"] is None
    later = read_metrics(tmp_path / "m.jsonl")[2]
    assert later["executed_tflops_per_device"] == pytest.approx(2 * 6 * 1e5 / 0.5 / 2 / 1e12)


def test_speed_is_that_of_all_steps_since_the_line_before(tmp_path):
    """Steps 4 to 6 take 1, 2 and 3 seconds for 40, 50 and 60 tokens: 25 a second, and none of the steps before."""
    hook = log_hooks(tmp_path / "m.jsonl", 3, 6, tokens_before=lambda step: 5 * step * (step + 1))  # 10, 20, 30, ...
    for step in range(1, 7):
        hook(info(step, seconds=10.0 if step < 4 else step - 3.0))
    lines = read_metrics(tmp_path / "m.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 6]
    assert [line["tokens_per_s"] for line in lines] == pytest.approx([10 / 10, 50 / 20, 150 / 6])
    assert [line["tokens"] for line in lines] == [10, 60, 210]
    assert lines[2]["tflops_per_device"] == pytest.approx(25 * 1e6 / 2 / 1e12)
    assert lines[2]["executed_tflops_per_device"] == pytest.approx(3 * 6 * 1e5 / 6 / 2 / 1e12)


def test_the_console_says_how_long_the_rest_will_take(tmp_path, caplog):
    """At the speed of the line: 200 tokens a second, then 50; 100 tokens a step."""
    hook = log_hooks(tmp_path / "m.jsonl", 2, 10_001)
    with caplog.at_level("INFO", logger="megadiff"):
        for step, seconds in ((1, 0.5), (2, 2.0)):
            hook(info(step, seconds=seconds))
    assert [re.search(r"ETA (\S+)", message)[1] for message in caplog.messages] == ["1:23:20", "5:33:18"]
    assert "200 tokens/s" in caplog.messages[0]


def test_the_console_shows_token_means_since_its_last_line(tmp_path, caplog):
    """Loss sums 3 + 5 + 100 over 1 + 3 + 4 noisy tokens; the skipped step between has a line of its own."""
    hook = log_hooks(tmp_path / "m.jsonl", 4, 4)
    steps = [(1, 7.0, 2.0, None), (2, 3.0, 1.0, None), (3, math.nan, 1.0, "non_finite"), (4, 105.0, 7.0, None)]
    with caplog.at_level("INFO", logger="megadiff"):
        for step, loss, tokens, skip in steps:
            hook(info(step, skipped=skip, at_0=loss, at_5=tokens))
    assert [re.search(r"loss (\S+)", message)[1] for message in caplog.messages] == ["3.5000", "nan", "13.5000"]
    assert [line["loss"] for line in read_metrics(tmp_path / "m.jsonl")] == [3.5, None, 15.0]


def test_a_skipped_steps_line_has_its_reason_and_null_for_non_finites(tmp_path, caplog):
    hook = log_hooks(tmp_path / "m.jsonl", 10, 10)
    with caplog.at_level("INFO", logger="megadiff"):
        for step in (1, 2, 3, 4):
            hook(info(step, skipped="non_finite", at_0=math.nan, at_1=math.inf) if step == 3 else info(step))
    text = (tmp_path / "m.jsonl").read_text()
    first, third = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    assert (third["step"], third["skipped"], third["loss"], third["elbo"]) == (3, "non_finite", None, None)
    assert "skipped" not in first
    assert [message.endswith("| skipped: non_finite") for message in caplog.messages] == [False, True]


def test_other_parts_can_add_keys_to_a_line(tmp_path):
    hook = log_hooks(tmp_path / "m.jsonl", 1, 1, extras=[lambda: {"goodput": 0.9}, lambda: {"lost_s": 3}])
    hook(info(1))
    (line,) = read_metrics(tmp_path / "m.jsonl")
    assert (line["goodput"], line["lost_s"]) == (0.9, 3)
