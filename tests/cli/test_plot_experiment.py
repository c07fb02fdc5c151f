"""Runs of an experiment side by side, from their folders alone."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import yaml

from megadiff.cli.plot_experiment import Curve, draw, ordered, read_run, summary
from megadiff.errors import DataError


def write_run(folder, *, sequences, bounds, every=10):
    """A run folder of `sequences` sequences of 8 tokens a step, with a training line and an evaluation every `every`
    steps."""
    folder.mkdir()
    (folder / "config.yaml").write_text(
        yaml.dump({"batch": {"global_batch_size": sequences}, "noise": {"shift": "masked"}})
    )
    lines = [{"step": 0, "eval_elbo": bounds[0], "eval_elbo_stderr": 0.1}]
    for number, bound in enumerate(bounds[1:], start=1):
        lines.append({"step": number * every, "tokens": number * every * sequences * 8, "loss": 1.0})
        lines.append({"step": number * every, "eval_elbo": bound, "eval_elbo_stderr": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_runs_curve_is_its_held_out_bound_by_tokens(tmp_path):
    curve = read_run(write_run(tmp_path / "b4", sequences=4, bounds=[5.0, 4.0, 3.0]), "batch.global_batch_size")
    assert (curve.name, curve.setting) == ("b4", 4)
    assert curve.tokens.tolist() == [0, 320, 640]
    assert curve.bound.tolist() == [5.0, 4.0, 3.0]
    assert curve.stderr.tolist() == [0.1, 0.1, 0.1]


def test_tokens_to_a_bound_are_interpolated_in_their_logarithm():
    curve = Curve("x", 1, np.array([0.0, 100, 400]), np.array([5.0, 4.0, 3.0]), np.zeros(3))
    assert curve.tokens_to(3.5) == pytest.approx(200)
    assert curve.tokens_to(3.0) == pytest.approx(400)
    assert curve.tokens_to(4.5) == 100  # before it there are no tokens to interpolate from
    assert curve.tokens_to(2.9) is None


def test_runs_are_ordered_by_a_number_and_kept_as_given_by_a_word(tmp_path):
    runs = [
        write_run(tmp_path / name, sequences=sequences, bounds=[5.0, 4.0]) for name, sequences in (("b", 16), ("a", 2))
    ]
    by_batch = ordered([read_run(run, "batch.global_batch_size") for run in runs])
    assert [curve.setting for curve in by_batch] == [2, 16]
    assert [curve.name for curve in ordered([read_run(run, "noise.shift") for run in runs])] == ["b", "a"]


def test_the_table_says_how_soon_each_run_reached_a_target(tmp_path):
    curves = [read_run(write_run(tmp_path / "b4", sequences=4, bounds=[5.0, 4.0, 3.0]), "batch.global_batch_size")]
    table = summary(curves, "batch.global_batch_size", [4.0, 1.0])
    assert [list(column.cells) for column in table.columns] == [
        ["b4"], ["4"], ["640"], ["3.0000"], ["0.1000"], ["320"], ["-"],
    ]  # fmt: skip


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path):
    run = write_run(tmp_path / "run", sequences=4, bounds=[5.0, 4.0])
    with pytest.raises(DataError, match=r"nowhere: no config.yaml here; a run folder is wanted"):
        read_run(tmp_path / "nowhere", "noise.shift")
    with pytest.raises(DataError, match=r"run: its config.yaml has no `noise.shifts`"):
        read_run(run, "noise.shifts")
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 32}\n')
    with pytest.raises(DataError, match=r"run: metrics.jsonl holds no held-out bound yet"):
        read_run(run, "noise.shift")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.parametrize("targets", [[], [3.5, 1.0]])
def test_the_figure_is_written(tmp_path, targets):
    runs = [write_run(tmp_path / f"b{sequences}", sequences=sequences, bounds=[5.0, 4.0, 3.0]) for sequences in (2, 4)]
    draw(
        [read_run(run, "batch.global_batch_size") for run in runs],
        "batch.global_batch_size",
        targets,
        tmp_path / "f.png",
    )
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
