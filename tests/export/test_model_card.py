"""Scores in the model card, from metrics of which the last line is not what one would wish."""

from __future__ import annotations

import json
import os

import pytest

from megadiff.export.export import _scores, export
from tests.report.folders import evaluation_line, training_line

NOT_FINITE = {"ELBO of the last training step logged": "not a finite number"}


@pytest.mark.parametrize(
    ("lines", "scores"),
    [
        ([training_line(1), training_line(2, elbo=None)], NOT_FINITE),
        ([training_line(1), training_line(2, elbo="x")], NOT_FINITE),
        ([training_line(1, elbo=3.0)], {"ELBO of the last training step logged": "3.0000 nats per noisy token"}),
        (
            [evaluation_line(1, eval_elbo=None, eval_bits_per_byte=None)],
            {"held-out ELBO": "not a finite number"},
        ),
        (
            [evaluation_line(1, 2.0, eval_elbo_stderr=None, eval_bits_per_byte="x")],
            {"held-out ELBO": "2.0000 nats per token"},
        ),
        ([{"step": 1}], {}),
    ],
)
@pytest.mark.parametrize("tail", [b"", b'{"step": 2, "elb', b'{"step": "two"}\n[]\nnull\n\xff\n', b"[" * 300_000])
def test_a_figure_that_is_none_is_reported_and_the_rest_is_kept(tmp_path, lines, scores, tail):
    (tmp_path / "metrics.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + tail)
    assert _scores(tmp_path / "metrics.jsonl", 2) == scores


def test_later_lines_do_not_count_and_a_missing_or_special_file_has_none(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert _scores(metrics, 2) == _scores(None, 2) == {}
    metrics.write_text("".join(json.dumps(training_line(step, elbo=float(step))) + "\n" for step in (1, 2, 3)))
    assert _scores(metrics, 2)["ELBO of the last training step logged"].startswith("2.0000")
    metrics.unlink()
    os.mkfifo(metrics)
    assert _scores(metrics, 2) == {}


def test_a_run_that_ended_on_a_step_that_was_not_finite_is_exported(checkpoints, tmp_path):
    metrics = checkpoints["tp1"].parent.parent / "metrics.jsonl"
    before = metrics.read_bytes()
    try:
        with metrics.open("a") as file:
            file.write(json.dumps({"step": 4, "elbo": None, "loss": None}) + "\n")
        card = (export(checkpoints["tp1"], tmp_path / "out").folder / "README.md").read_text()
    finally:
        metrics.write_bytes(before)
    assert "| ELBO of the last training step logged | not a finite number |" in card
