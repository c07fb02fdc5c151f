"""Unigram and bigram figures against sums written out token by token."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from megadiff.data import baselines
from megadiff.data.baselines import SmoothedBigrams, count_baselines, unigram_entropy
from megadiff.data.indexed_format import tokenizer_facts
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.tokenizers.byte import ByteTokenizer

V = 260


def markov(tokens: int, seed: int, states: int = 40) -> np.ndarray:
    """Return tokens of a chain in which each depends on the one before, [tokens] from 4 on."""
    draw = np.random.default_rng(seed)
    table = np.random.default_rng(7).dirichlet(np.full(states, 0.1), size=states).cumsum(axis=1)
    found = [0]
    for chance in draw.random(tokens - 1):
        found.append(int(np.searchsorted(table[found[-1]], chance * table[found[-1]][-1])))
    return 4 + np.array(found)


def source(prefix, tokens: np.ndarray, *, source_bytes: int | None = None) -> IndexedReader:
    with IndexedWriter(prefix, vocab_size=V) as writer:
        for part in np.split(tokens, range(100, len(tokens), 100)):
            writer.add_document(part)
        writer.finish(tokenizer=tokenizer_facts(ByteTokenizer()), source_bytes=source_bytes or len(tokens))
    return IndexedReader(prefix)


def entropy_by_hand(tokens) -> float:
    counts = Counter(tokens.tolist())
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())


def bigram_loss_by_hand(train, valid, strength: float) -> float:
    """Return the mean loss in nats of the smoothed model, from dictionaries."""
    train, valid = train.tolist(), valid.tolist()
    ones, pairs, firsts = Counter(train), Counter(itertools.pairwise(train)), Counter(train[:-1])
    frequency = {b: (ones[b] + 0.5) / (len(train) + 0.5 * V) for b in range(V)}
    loss = -math.log(frequency[valid[0]])
    for a, b in itertools.pairwise(valid):
        loss -= math.log((pairs[a, b] + strength * frequency[b]) / (firsts[a] + strength))
    return loss / len(valid)


def left_out_loss_by_hand(train, strength: float) -> float:
    train = train.tolist()
    ones, pairs, firsts = Counter(train), Counter(itertools.pairwise(train)), Counter(train[:-1])
    frequency = {b: (ones[b] + 0.5) / (len(train) + 0.5 * V) for b in range(V)}
    return -sum(
        math.log((pairs[a, b] - 1 + strength * frequency[b]) / (firsts[a] - 1 + strength))
        for a, b in itertools.pairwise(train)
    )


def test_both_figures_are_those_of_counts_by_hand(tmp_path):
    train, valid = markov(3000, 0), markov(900, 1)
    found = count_baselines([source(tmp_path / "t", train)], [1.0], [source(tmp_path / "v", valid)], [5], vocab_size=V)
    strength = SmoothedBigrams([train], vocab_size=V).strength
    assert found.unigram == pytest.approx(entropy_by_hand(valid), rel=1e-12)
    assert unigram_entropy(IndexedReader(tmp_path / "v"), vocab_size=V) == pytest.approx(found.unigram, rel=1e-12)
    assert found.bigram == pytest.approx(bigram_loss_by_hand(train, valid, strength), rel=1e-12)
    assert (found.training_tokens, found.validation_tokens, found.bytes_per_token) == (3000, 900, 1.0)
    assert found.bigram < found.unigram


def test_the_strength_of_the_prior_is_the_best_for_pairs_left_out():
    train = markov(3000, 0)
    found = SmoothedBigrams([train], vocab_size=V).strength
    at = left_out_loss_by_hand(train, found)
    assert all(at < left_out_loss_by_hand(train, found * factor) for factor in (0.5, 0.8, 1.25, 2.0))


def test_the_probabilities_after_a_token_add_up_to_one():
    model = SmoothedBigrams([markov(500, 0)], vocab_size=V)
    for first in (4, 20, 250):  # 250 was never seen
        after = [model.log_likelihood(np.array([first, second]))[1] for second in range(V)]
        assert np.exp(after).sum() == pytest.approx(1.0, abs=1e-12)


def test_a_chain_is_measured_near_its_own_entropy_and_never_far_below_it(tmp_path):
    """The entropy of counted pairs would be too low by a tenth here; the held-out figure errs upwards."""
    train, valid = markov(40_000, 0), markov(5_000, 1)
    table = np.random.default_rng(7).dirichlet(np.full(40, 0.1), size=40)
    share = np.bincount(np.concatenate((train, valid)) - 4, minlength=40) / 45_000
    true = -float(share @ np.where(table > 1e-300, table * np.log(np.maximum(table, 1e-300)), 0).sum(axis=1))
    found = count_baselines([source(tmp_path / "t", train)], [1], [source(tmp_path / "v", valid)], [1], vocab_size=V)
    assert true - 0.05 < found.bigram < true + 0.15


def test_sources_count_by_their_shares(tmp_path):
    ones, twos = np.full(300, 10), np.full(200, 11)
    sources = [source(tmp_path / "a", ones), source(tmp_path / "b", twos, source_bytes=400)]
    found = count_baselines(sources, [1, 1], sources, [3, 1], vocab_size=V)
    assert found.unigram == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-12)
    assert found.bytes_per_token == pytest.approx(0.75 * 1 + 0.25 * 2)


def test_large_sources_are_sampled_in_contiguous_spans_all_over_the_file(tmp_path, monkeypatch):
    """Every token is its place in the file, so that spans show where they were taken."""
    monkeypatch.setattr(baselines, "TRAINING_TOKENS", 640)
    reader = source(tmp_path / "t", np.arange(20_000) % 250)
    (spans,) = baselines._spans_of([reader], [1.0], 640)
    assert len(spans) == 64
    assert all(len(span) == 10 and set(np.diff(span) % 250) == {1} for span in spans)
    assert spans[0][0] == 0
    assert spans[-1][-1] == 19_999 % 250
    found = count_baselines([reader], [1], [reader], [1], vocab_size=V)
    assert (found.training_tokens, found.validation_tokens) == (640, 20_000)


def test_a_source_of_one_token_is_no_obstacle(tmp_path):
    reader = source(tmp_path / "t", np.array([5]))
    found = count_baselines([reader], [1], [reader], [1], vocab_size=V)
    assert found.unigram == 0.0
    assert math.isfinite(found.bigram)


def test_figures_are_counted_once_and_again_for_other_data(tmp_path, monkeypatch):
    train, other = (source(tmp_path / name, markov(3000, seed)) for name, seed in (("train", 1), ("other", 2)))
    valid = source(tmp_path / "valid", markov(800, 3))
    counted = []
    count = baselines.count_baselines

    def watched(*data, **options):
        counted.append(data)
        return count(*data, **options)

    monkeypatch.setattr(baselines, "count_baselines", watched)
    first = baselines.baselines_of_data([train], [1.0], [valid], [5], vocab_size=64)
    assert baselines.baselines_of_data([train], [7.0], [valid], [9], vocab_size=64) == first  # the same shares
    assert len(counted) == 1
    second = baselines.baselines_of_data([other], [1.0], [valid], [5], vocab_size=64)
    assert (len(counted), second.unigram) == (2, first.unigram)
    assert second.bigram != first.bigram
    file = tmp_path / "valid.baselines.json"
    for damage in ("", "[]", file.read_text().replace('"unigram": ', '"unigram": "'), '{"data": 1}'):
        file.write_text(damage)
        assert baselines.baselines_of_data([other], [1.0], [valid], [5], vocab_size=64) == second


def test_figures_are_counted_where_they_cannot_be_kept(tmp_path):
    train, valid = (source(tmp_path / name, markov(800, seed)) for name, seed in (("train", 1), ("valid", 3)))
    (tmp_path / "valid.baselines.json").mkdir()
    found = baselines.baselines_of_data([train], [1.0], [valid], [5], vocab_size=64)
    assert found == baselines.count_baselines([train], [1.0], [valid], [5], vocab_size=64)
