"""Cooldowns branched from a trunk, and the autoregressive control, through the real wiring."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def _tail(curve: list[dict[str, Any]], after: int) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "elbo", "grad_norm", "lr")
    return [tuple(line[key] for key in keys) for line in curve if line["step"] > after]


@pytest.mark.parametrize("optimizer", ["adamw", "laprop"])
def test_cooldowns_from_one_trunk_equal_full_runs_bit_for_bit(corpus: Path, tmp_path: Path, optimizer: str) -> None:
    def run(name: str, **dotted: Any) -> list[dict[str, Any]]:
        config = toy_config(
            corpus, tmp_path, name=name, optimizer__name=optimizer, checkpoint__every=4, data__valid=[], **dotted
        )
        return on_ranks(1, train_on_rank, config, 1, save=True)[0].lines

    run("trunk", schedule__steps=8, schedule__decay_steps=0)
    start = str(tmp_path / "trunk" / "checkpoints" / "step_00000004")
    for length in (3, 5):
        shape = {"schedule__steps": 4 + length, "schedule__decay_steps": length}
        branch = run(f"branch-{length}", checkpoint__start_from=start, **shape)
        whole = run(f"whole-{length}", **shape)
        assert _tail(branch, 0) == _tail(whole, 4)
        assert branch[-1]["lr"] < branch[0]["lr"]


def test_a_branch_that_ends_before_it_begins_is_refused(corpus: Path, tmp_path: Path) -> None:
    trunk = toy_config(corpus, tmp_path, name="trunk", schedule__steps=4, data__valid=[], schedule__decay_steps=0)
    on_ranks(1, train_on_rank, trunk, 1, save=True)
    start = str(trunk.folder / "checkpoints" / "step_00000004")
    late = toy_config(corpus, tmp_path, name="late", schedule__steps=3, checkpoint__start_from=start, data__valid=[])
    with pytest.raises(AssertionError, match="was saved after step 4, but this run ends after step 3"):
        on_ranks(1, train_on_rank, late, 1)


def test_an_autoregressive_run_starts_at_exactly_log_n_and_learns(corpus: Path, tmp_path: Path) -> None:
    config = toy_config(corpus, tmp_path, method__name="next_token", model__head_init=0.0, optimizer__lr=2e-2)
    trained = on_ranks(1, train_on_rank, config, 1)[0]
    first, last = trained.lines[0], trained.lines[-1]
    assert first["loss"] == pytest.approx(math.log(259), rel=1e-6)
    assert first["elbo"] == first["loss"] == first["kl"]
    assert last["loss"] < 0.8 * first["loss"]
    assert trained.evaluations[0]["eval_elbo"] == pytest.approx(math.log(259), rel=1e-6)
    assert trained.evaluations[0]["eval_elbo_stderr"] < 1e-6


def test_an_autoregressive_run_is_the_same_on_every_parallel_layout(corpus: Path, tmp_path: Path) -> None:
    def curve(name: str, ranks: int, **parallel: Any) -> list[float]:
        config = toy_config(
            corpus, tmp_path, name=name, method__name="next_token", parallel=parallel, model__sink=True, data__valid=[]
        )
        return on_ranks(ranks, train_on_rank, config, ranks)[0].curve("loss")

    alone = curve("alone", 1)
    assert curve("tp2", 2, tensor=2, sequence=True) == pytest.approx(alone, rel=1e-5)
    assert curve("pp2", 2, pipeline=2) == pytest.approx(alone, rel=1e-5)


def test_prompts_give_the_same_curve_on_every_layout_and_report_shares(corpus: Path, tmp_path: Path) -> None:
    def run(name: str, ranks: int, attention: str, **parallel: Any) -> list[dict[str, Any]]:
        conditioning = {"preset": "as_described", "prompt": 0.5, "infilling": 0.2, "prompt_attention": attention}
        config = toy_config(
            corpus, tmp_path, name=name, conditioning=conditioning, parallel=parallel, data__valid=[], model__sink=True
        )
        return on_ranks(ranks, train_on_rank, config, ranks)[0].lines

    for attention in ("block", "causal"):
        alone = run(f"alone-{attention}", 1, attention)
        losses = [line["loss"] for line in alone]
        for name, ranks, parallel in (
            ("tp2", 2, {"tensor": 2, "sequence": True}),
            ("pp2dp2", 4, {"pipeline": 2}),
        ):
            lines = run(f"{name}-{attention}", ranks, attention, **parallel)
            assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
        shares = [
            sum(line.get(f"fraction_{kind}", 0.0) for line in alone) / len(alone)
            for kind in ("prompt", "pad_insertion")
        ]
        assert 0.3 < shares[0] < 0.7
        assert 0.05 < shares[1] < 0.15
