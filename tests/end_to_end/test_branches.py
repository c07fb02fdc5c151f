"""Cooldowns branched from a trunk, and the autoregressive control, through the real wiring."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_all, train_on_rank, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def _tail(curve: list[dict[str, Any]], after: int) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "elbo", "grad_norm", "lr")
    return [tuple(line[key] for key in keys) for line in curve if line["step"] > after]


OPTIMIZERS, LENGTHS, BRANCH_AT = ("adamw", "laprop"), (3, 5), 4


@pytest.fixture(scope="module")
def cooldowns(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """`{(optimizer, run): lines}`; the trunks and whole runs are trained by one rank, the branches by another."""
    folder = tmp_path_factory.mktemp("cooldowns")

    def train(runs: dict[str, dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
        cases = [(optimizer, name) for optimizer in OPTIMIZERS for name in runs]
        shared = {"checkpoint__every": BRANCH_AT, "data__valid": []}
        configs = []
        for optimizer, name in cases:
            settings = {**shared, **runs[name], "optimizer__name": optimizer}
            if name.startswith("branch"):
                start = folder / optimizer / f"trunk/checkpoints/step_{BRANCH_AT:08d}"
                settings["checkpoint__start_from"] = str(start)
            configs.append(toy_config(corpus, folder / optimizer, name=name, **settings))
        found = on_ranks(1, train_all, configs, 1, save=True)[0]
        return {case: trained.lines for case, trained in zip(cases, found, strict=True)}

    def shape(length: int) -> dict[str, int]:
        return {"schedule__steps": BRANCH_AT + length, "schedule__decay_steps": length}

    trunk = {"trunk": {"schedule__steps": BRANCH_AT + 1, "schedule__decay_steps": 0}}
    whole = train({**trunk, **{f"whole-{length}": shape(length) for length in LENGTHS}})
    return {**whole, **train({f"branch-{length}": shape(length) for length in LENGTHS})}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_cooldowns_from_one_trunk_equal_full_runs_bit_for_bit(
    cooldowns: dict[tuple[str, str], list[dict[str, Any]]], optimizer: str
) -> None:
    for length in LENGTHS:
        branch, whole = cooldowns[optimizer, f"branch-{length}"], cooldowns[optimizer, f"whole-{length}"]
        assert len(branch) == length
        assert _tail(branch, 0) == _tail(whole, BRANCH_AT)
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


SPLITS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2dp2": (4, {"pipeline": 2}),
}
METHODS: dict[str, dict[str, Any]] = {
    "next token": {"method__name": "next_token"},
    **{
        f"prompts, {attention}": {
            "conditioning": {"preset": "as_described", "prompt": 0.5, "infilling": 0.2, "prompt_attention": attention}
        }
        for attention in ("block", "causal")
    },
}


CASES = [
    *((method, layout) for method in METHODS for layout in ("alone", "tp2")),
    ("next token", "pp2"),
    *((method, "pp2dp2") for method in METHODS if method != "next token"),
]


@pytest.fixture(scope="module")
def split(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """`{(method, layout): lines}`; each number of ranks is started once for all its runs."""
    folder, found = tmp_path_factory.mktemp("splits"), {}
    shared = {"model__layers": 2, "model__sink": True, "data__valid": []}
    for ranks in (1, 2, 4):
        configs = {
            (method, layout): toy_config(
                corpus, folder / layout, name=method, parallel=SPLITS[layout][1], **shared, **METHODS[method]
            )
            for method, layout in CASES
            if SPLITS[layout][0] == ranks
        }
        trained = on_ranks(ranks, train_all, list(configs.values()), ranks)[0]
        found |= {case: each.lines for case, each in zip(configs, trained, strict=True)}
    return found


def _losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.mark.parametrize(("method", "layout"), [case for case in CASES if case[1] != "alone"])
def test_a_method_gives_the_same_curve_on_every_layout(
    split: dict[tuple[str, str], list[dict[str, Any]]], method: str, layout: str
) -> None:
    assert _losses(split[method, layout]) == pytest.approx(_losses(split[method, "alone"]), rel=1e-5)


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_shares_of_prompts_and_pads_are_reported(
    split: dict[tuple[str, str], list[dict[str, Any]]], attention: str
) -> None:
    alone = split[f"prompts, {attention}", "alone"]
    prompts, pads = (
        sum(line.get(f"fraction_{kind}", 0.0) for line in alone) / len(alone) for kind in ("prompt", "pad_insertion")
    )
    assert 0.3 < prompts < 0.7
    assert 0.05 < pads < 0.15
