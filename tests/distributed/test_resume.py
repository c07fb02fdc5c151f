"""A run cut off between two checkpoints goes on as if it had not been, on its own layout and on another.

Several steps after the resume are compared: megatron-core's defects around Adam's `step` (see
`megadiff.optim.optimizer`) show only from the second one on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, largest_relative_difference, read_metrics, toy_config, train_all

pytestmark = pytest.mark.timeout(1200)

STEPS, CHECKPOINT_AT = 8, 4
EXACT = ("loss", "elbo", "kl", "itakura_saito", "weight", "grad_norm", "lr", "tokens")


@dataclass(frozen=True)
class Case:
    """A run started on one layout and taken up on others."""

    ranks: int
    layout: dict[str, Any]
    elsewhere: tuple[tuple[int, dict[str, Any], float], ...] = ()
    """(ranks, layout, relative difference allowed in loss)."""


DISTOPT = {"parallel__distributed_optimizer": True}
BF16 = {"precision__compute": "bf16"}
NO_MASTERS = {"precision__master_weights": False, "optimizer__name": "laprop", "optimizer__clip_grad": 0}
GIDD = {f"model__{key}": value for key, value in GIDD_BLOCK.items()}
TP2, PP2 = {"parallel__tensor": 2}, {"parallel__pipeline": 2}
VP2 = {**PP2, "parallel__virtual_pipeline": 2}

CASES = {
    "one_rank": Case(1, {}),
    "one_rank_bf16": Case(1, BF16),
    "one_rank_bf16_without_masters": Case(1, {**BF16, **NO_MASTERS}),
    "tp2_to_pp2": Case(2, TP2, ((2, PP2, 1e-5),)),
    "pp2_vp2_gidd_to_tp2": Case(2, {**VP2, **GIDD}, ((2, {**TP2, **GIDD}, 1e-5),)),
    "dp2_distopt": Case(2, DISTOPT, ((1, DISTOPT, 1e-5),)),
    "dp2_distopt_bf16": Case(2, {**DISTOPT, **BF16}, ((1, {**DISTOPT, **BF16}, 2e-3),)),
    "four_ranks_distopt_to_one": Case(
        4,
        {**TP2, **PP2, "parallel__sequence": True, **DISTOPT},
        ((1, DISTOPT, 1e-5), (2, {**VP2, **DISTOPT}, 1e-5)),
    ),
}
ELSEWHERE = [(name, i) for name, case in CASES.items() for i in range(len(case.elsewhere))]


@pytest.fixture(scope="module")
def runs(toy_corpus, tmp_path_factory):
    """`{(case, which): metrics lines}` with which = `whole`, `same`, or the number of the other layout."""
    root = tmp_path_factory.mktemp("resume")

    def config(name, which, layout):
        return toy_config(
            toy_corpus,
            root / str(which),
            name=name,
            schedule__steps=STEPS,
            checkpoint__every=CHECKPOINT_AT,
            checkpoint__keep=0,
            data__valid=[],
            **layout,
        )

    def together(jobs, *, save):
        """Start each number of ranks once, for all its runs; saving takes longer than training here."""
        for ranks in sorted({ranks for ranks, _ in jobs}):
            on_ranks(
                ranks, train_all, [config for count, config in jobs if count == ranks], ranks, save=save, timeout_s=1000
            )
        return [read_metrics(config.folder / "metrics.jsonl") for _, config in jobs]

    whole = [(case.ranks, config(name, "whole", case.layout)) for name, case in CASES.items()]
    found = {(name, "whole"): lines for name, lines in zip(CASES, together(whole, save=True), strict=True)}
    again = {
        (name, which): (ranks, config(name, which, layout))
        for name, case in CASES.items()
        for which, (ranks, layout, *_) in enumerate([(case.ranks, case.layout), *case.elsewhere], -1)
    }
    for (name, _), (_, resumed) in again.items():
        _as_killed_after_step(7, root / "whole" / name, resumed.folder)
    return {**found, **dict(zip(again, together(list(again.values()), save=False), strict=True))}


def _as_killed_after_step(step, whole, folder):
    """A run folder as SIGKILL leaves it: an old checkpoint, lines past it, a torn line, a save under way."""
    shutil.copytree(whole, folder)
    last = folder / f"checkpoints/step_{STEPS:08d}"
    (last / "manifest.json").unlink()
    last.rename(last.with_name(f".{last.name}.tmp"))
    (folder / "LATEST").write_text("step_00000008\n")
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:step]
    torn = json.dumps({"step": step + 1, "loss": 1.0})[:14]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + torn)


def _is_taken_up_once(whole, resumed):
    """No step has two lines, those before the checkpoint are the old ones, and those after it are new."""
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert resumed[:CHECKPOINT_AT] == whole[:CHECKPOINT_AT]
    assert resumed[CHECKPOINT_AT]["elapsed_s"] != whole[CHECKPOINT_AT]["elapsed_s"]


@pytest.mark.parametrize("name", CASES)
def test_on_its_own_layout_a_resumed_run_repeats_the_curve_bit_for_bit(runs, name):
    whole, resumed = runs[name, "whole"], runs[name, -1]
    _is_taken_up_once(whole, resumed)
    assert [[line[key] for key in EXACT] for line in resumed] == [[line[key] for key in EXACT] for line in whole]


@pytest.mark.parametrize(("name", "which"), ELSEWHERE)
def test_on_another_layout_a_resumed_run_gives_the_same_curve(runs, name, which):
    whole, resumed = runs[name, "whole"], runs[name, which]
    tolerance = CASES[name].elsewhere[which][2]
    _is_taken_up_once(whole, resumed)
    for key, allowed in {"loss": tolerance, "elbo": tolerance, "grad_norm": 10 * tolerance}.items():
        curves = [[line[key] for line in lines[CHECKPOINT_AT:]] for lines in (resumed, whole)]
        difference = largest_relative_difference(*curves)
        assert difference <= allowed, (key, difference)
