"""The sweep trains real runs, does not repeat them, and reads its optimum off their held-out bounds."""

from __future__ import annotations

import argparse

import pytest
import yaml

from megadiff.cli import learning_rate_sweep as sweep
from megadiff.metric_lines import read_metrics
from megadiff.scaling.optimum import optimum
from tests.support.ranks import on_ranks
from tests.support.runs import toy_tree, wire_on_rank


def test_sizes_are_width_x_depth():
    assert sweep.size("64x8") == (64, 8)
    for bad in ("64", "64x", "x8", "48x2", "64x0", "64x2x2", "-64x2"):
        with pytest.raises(argparse.ArgumentTypeError, match="WIDTHxDEPTH is wanted"):
            sweep.size(bad)


def test_rates_double():
    assert sweep.rates(0.05, 4) == [0.05, 0.1, 0.2, 0.4]


def test_the_table_marks_the_best_rate_and_an_edge():
    losses = {(64, 2): {0.1: 3.0, 0.2: 2.5, 0.4: 2.75}, (128, 2): {0.1: 3.0, 0.2: 2.5, 0.4: 2.25}}
    table = sweep.table("title", losses, {at: optimum(found) for at, found in losses.items()})
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["64 x 2", "128 x 2"]
    assert cells[2:5] == [["2.500*", "2.500"], ["2.750", "2.250*"], ["0.2", "0.4 (edge)"]]


def test_a_picture_has_a_line_for_each_size(tmp_path):
    pytest.importorskip("matplotlib")
    losses = {(64, 2): {0.1: 3.0, 0.2: 2.5, 0.4: 2.75}, (128, 2): {0.1: 3.0, 0.2: 2.5, 0.4: 2.25}}
    sweep.draw({"completep": losses, "standard": losses}, tmp_path / "rates.svg")
    text = (tmp_path / "rates.svg").read_text()
    assert text.count("width 128, depth 2") == 2
    assert "held-out ELBO" in text


@pytest.fixture
def config(toy_corpus, tmp_path):
    """A run of three steps, as a file."""
    tree = toy_tree(toy_corpus, tmp_path / "runs", schedule__steps=3, eval__sequences=4)
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.dump(tree))
    return path


def _sweep_on_rank(config):
    """Two rates trained for real; then the first again, which must not train."""
    from megadiff.run import build

    build.run = lambda described: wire_on_rank(described, 1).train()
    first, second = (sweep.run(config, "completep", (32, 2), rate) for rate in (0.1, 0.4))

    def refuse(described):
        raise AssertionError("a run that is done was trained again")

    build.run = refuse
    return first, second, sweep.run(config, "completep", (32, 2), 0.1)


def test_a_run_is_trained_once_and_its_last_bound_is_what_counts(config, tmp_path):
    first, second, again = on_ranks(1, _sweep_on_rank, config)[0]
    assert first == again != second
    lines = read_metrics(tmp_path / "runs" / "completep-d32-L2-lr0.1" / "metrics.jsonl")
    assert [line["eval_elbo"] for line in lines if line["step"] == 3 and "eval_elbo" in line] == [first]


def test_a_run_that_diverged_counts_as_infinite(config, monkeypatch):
    from megadiff.errors import TrainingError
    from megadiff.run import build

    def diverge(described):
        raise TrainingError("step 2: the gradient norm is nan")

    monkeypatch.setattr(build, "run", diverge)
    assert sweep.run(config, "standard", (32, 2), 100.0) == float("inf")
