"""What a run prints before it has learned anything is known in closed form (gidd.md 1.10.6): a zero head predicts the
uniform distribution over real tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.platform.quiet import quiet
from tests.support.closed_forms import blind_model
from tests.support.ranks import on_ranks
from tests.support.runs import platform_on_rank, read_metrics, toy_config

with quiet():
    from megadiff.run import build

STEPS = 12
SHIFTS = (-1000.0, 0.0, 1000.0)
GPT2_VOCABULARY = 50_258


@pytest.mark.parametrize(
    ("shift", "elbo", "loss"),
    [(-1000.0, 10.824905, 1.804596), (0.0, 10.823842, 1.769281), (1000.0, 10.824847, 1.804567)],
)
def test_the_quadrature_gives_the_published_values(shift, elbo, loss):
    assert blind_model(shift, GPT2_VOCABULARY) == pytest.approx((elbo, loss), abs=2e-6)


def byte_tokenizer_of(vocab_size: int) -> ByteTokenizer:
    """The byte tokenizer with room for ids no text has."""
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    return tokenizer


def _print_before_learning(configs: dict[Any, Any]) -> dict[Any, list[dict[str, Any]]]:
    platform = platform_on_rank()
    for (_, vocab_size), config in configs.items():
        config.folder.mkdir(parents=True)
        prepared = build.validate_run(config, world_size=1)
        run = build.build_trainer(replace(prepared, tokenizer=byte_tokenizer_of(vocab_size)), platform)
        run.hooks = run.hooks[:-1]
        run.train()
    return {case: read_metrics(config.folder / "metrics.jsonl") for case, config in configs.items()}


@pytest.fixture(scope="module")
def printed(toy_corpus, tmp_path_factory):
    """`{(shift, vocabulary size): lines}` of runs whose learning rate moves nothing."""
    folder = tmp_path_factory.mktemp("zero")
    configs = {
        (shift, vocab_size): toy_config(
            toy_corpus,
            folder,
            name=f"{shift:g}_{vocab_size}",
            noise__shift=shift,
            model__layers=1,
            model__head_init=0.0,
            batch__global_batch_size=sequences,
            batch__micro_batch_size=8,
            optimizer__lr=1e-30,
            schedule__steps=STEPS,
            data__valid=[],
        )
        for vocab_size, sequences in ((260, 64), (GPT2_VOCABULARY, 8))
        for shift in SHIFTS
    }
    return on_ranks(1, _print_before_learning, configs, timeout_s=1000)[0]


CASES = [(shift, vocab_size) for vocab_size in (260, GPT2_VOCABULARY) for shift in SHIFTS]


@pytest.mark.parametrize(("shift", "vocab_size"), CASES)
def test_a_fresh_run_prints_the_closed_form(printed, shift, vocab_size):
    """Within four standard errors, estimated from twelve independent batches: their mean, and the first line alone."""
    elbo, loss = blind_model(shift, vocab_size)
    for key, value in {"elbo": elbo, "loss": loss, "weight": 0.5}.items():
        drawn = np.array([line[key] for line in printed[shift, vocab_size]])
        deviation = drawn.std(ddof=1)
        assert abs(drawn.mean() - value) <= 4 * deviation / math.sqrt(STEPS), (key, drawn.mean(), value)
        assert abs(drawn[0] - value) <= 4 * deviation, (key, drawn[0], value)
        assert deviation < 0.25 * value, "a test that anything would pass"


def test_the_first_update_has_rate_zero(printed):
    assert {lines[0]["lr"] for lines in printed.values()} == {0.0}
