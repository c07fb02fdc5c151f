"""A batch rampup through the real trainer: layouts, resumes, token counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank, write_corpus

RAMP = {"start": 4, "increment": 4, "every_steps": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def _lines(corpus: Path, folder: Path, name: str, ranks: int, steps: int = 9, **dotted: Any) -> list[dict[str, Any]]:
    config = toy_config(
        corpus,
        folder,
        name=name,
        batch={"global_batch_size": 12, "micro_batch_size": 2, "rampup": RAMP},
        data__valid=[],
        schedule__steps=steps,
        schedule__decay_steps=0,
        checkpoint__every=4,
        **dotted,
    )
    return on_ranks(ranks, train_on_rank, config, ranks, save=True)[0].lines


def test_a_rampup_counts_its_tokens_and_is_the_same_on_two_replicas(corpus: Path, tmp_path: Path) -> None:
    alone = _lines(corpus, tmp_path, "alone", 1)
    sequences = [4, 4, 4, 8, 8, 8, 12, 12, 12]
    assert [line["tokens"] for line in alone] == [16 * sum(sequences[: i + 1]) for i in range(9)]
    assert [line["noisy_tokens"] for line in alone] == [16 * count for count in sequences]
    both = _lines(corpus, tmp_path, "both", 2)
    assert [line["loss"] for line in both] == pytest.approx([line["loss"] for line in alone], rel=1e-5)
    for key in ("tflops_per_device", "executed_tflops_per_device"):  # tokens are the run's, devices share the work
        work = [[line[key] / line["tokens_per_s"] for line in lines] for lines in (alone, both)]
        assert work[1] == pytest.approx([value / 2 for value in work[0]], rel=1e-9)


def test_a_run_stopped_inside_a_rampup_goes_on_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    whole = _lines(corpus, tmp_path, "whole", 1)
    _lines(corpus, tmp_path, "halves", 1, steps=4)
    halves = _lines(corpus, tmp_path, "halves", 1)
    keys = ("step", "tokens", "loss", "elbo", "grad_norm")
    assert [[line[key] for key in keys] for line in halves] == [[line[key] for key in keys] for line in whole]
