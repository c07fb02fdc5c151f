"""Statistics of indexed data against counts of the same documents in plain Python."""

from __future__ import annotations

import math
import os
from collections import Counter

import numpy as np
import pytest

from megadiff.data import source_statistics
from megadiff.data.indexed_format import tokenizer_facts
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.source_statistics import PERCENTILES, evenly, excerpts, statistics_of
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.corpora import random_documents, write_indexed

BYTE = ByteTokenizer()
BOS, EOS, PAD = BYTE.bos_id, BYTE.eos_id, BYTE.pad_id


def documents_of_every_kind():
    """Repeated documents, framed ones, padded ones, one of a single token, among random ones."""
    plain = random_documents(80, seed=4)
    framed = [[BOS, *document, EOS] for document in random_documents(20, seed=5)]
    return [*plain, *framed, [9, PAD, PAD], [7], plain[3], plain[3], framed[2], [7]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    documents = documents_of_every_kind()
    other = [documents[0], [1, 2, 5], documents[0], [250] * 70]
    return {"first": documents, "other": other}, [
        IndexedReader(write_indexed(folder / name, held)) for name, held in (("first", documents), ("other", other))
    ]


@pytest.mark.parametrize("batch", [1, 50, 2**20])
def test_figures_equal_counts_in_plain_python(sources, monkeypatch, batch):
    monkeypatch.setattr(source_statistics, "_BATCH_TOKENS", batch)
    documents, readers = sources
    done = []
    for (name, held), found in zip(documents.items(), statistics_of(readers, None, done.append), strict=True):
        counts = Counter(token for document in held for token in document)
        total = sum(counts.values())
        groups = Counter(map(tuple, held))
        assert found.prefix.endswith(name)
        assert (found.documents, found.empty_documents, found.tokens) == (len(held), 0, total)
        assert (found.vocab_size, found.used_ids, found.source_bytes) == (260, len(counts), total)
        assert found.padding_tokens == counts[PAD]
        assert found.begin_with_bos == sum(document[0] == BOS for document in held)
        assert found.end_with_eos == sum(document[-1] == EOS for document in held)
        assert found.repeats == len(held) - len(groups)
        assert found.repeated_tokens == sum(len(document) * (times - 1) for document, times in groups.items())
        entropy = -math.fsum(count / total * math.log(count / total) for count in counts.values())
        assert found.unigram == pytest.approx(entropy, rel=1e-12)
        lengths = sorted(map(len, held))
        wanted = tuple(lengths[math.floor((len(held) - 1) * percentile / 100)] for percentile in PERCENTILES)
        assert found.lengths == wanted
        bins = Counter(length.bit_length() for length in lengths)
        assert {part.shortest.bit_length(): part.documents for part in found.histogram if part.documents} == bins
        assert sum(part.tokens for part in found.histogram) == total
        assert all(part.longest == 2 * part.shortest - 1 for part in found.histogram)
        best = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:10]
        assert list(found.most_frequent) == best
    assert done[-1] == sum(reader.num_tokens for reader in readers)
    assert done == sorted(done)


def test_repeated_and_shared_documents_are_named(sources):
    documents, readers = sources
    first, other = statistics_of(readers)
    held = documents["first"]
    assert [(group.first, group.times) for group in first.most_repeated] == [(3, 3), (82, 2), (101, 2)]
    assert [group.tokens for group in first.most_repeated] == [len(held[place]) for place in (3, 82, 101)]
    assert first.also_in == {}
    assert other.also_in == {readers[0].prefix: 2}, "the first document of both, which comes twice"


def test_a_chain_has_the_bigram_entropy_of_its_steps(tmp_path):
    """Each token is one of four equally likely successors of the one before: log 4, and log 64 without context."""
    draw = np.random.default_rng(1)
    ids = (4 + (np.cumsum(draw.integers(0, 4, 200_000) * 5 + 1) % 64)).tolist()
    found = statistics_of([IndexedReader(write_indexed(tmp_path / "chain", [ids]))])[0]
    assert found.unigram == pytest.approx(math.log(64), rel=0.01)
    assert math.log(4) < found.bigram == pytest.approx(math.log(4), rel=0.01)


def test_few_tokens_have_no_bigram_entropy(tmp_path):
    assert statistics_of([IndexedReader(write_indexed(tmp_path / "few", [[5, 6, 7]]))])[0].bigram is None


def test_without_a_manifest_the_largest_id_bounds_the_vocabulary(tmp_path):
    prefix = write_indexed(tmp_path / "p", [[5, 6], [300, 9]], vocab_size=400)
    os.remove(f"{prefix}.json")
    found = statistics_of([IndexedReader(prefix)])[0]
    assert (found.vocab_size, found.source_bytes, found.bytes_per_token) == (301, None, None)
    with pytest.raises(DataError, match=r"document 1 has the token id 300 at position 0 \(wanted 0 to 259\)"):
        statistics_of([IndexedReader(prefix)], tokenizer_facts(BYTE))


def test_an_id_that_no_tokenizer_has_is_refused_before_it_is_counted(tmp_path):
    prefix = write_indexed(tmp_path / "p", [[5, 2**30]], vocab_size=2**31 - 1)
    os.remove(f"{prefix}.json")
    with pytest.raises(DataError, match=r"wanted token ids below 16,777,216, found 1073741824, .*megadiff check_data"):
        statistics_of([IndexedReader(prefix)])


def test_excerpts_are_the_documents_texts_or_ids(tmp_path):
    held = [BYTE.encode("one"), [BOS, *BYTE.encode("two \u20ac"), EOS]]
    reader = IndexedReader(write_indexed(tmp_path / "p", held))
    found = excerpts(reader, [1, 0], tokens=6, tokenizer=BYTE)
    assert [(one.document, one.tokens, one.shown, one.text) for one in found] == [
        (1, 9, 6, "\u27e8bos\u27e9two \ufffd"),
        (0, 3, 3, "one"),
    ]
    assert excerpts(reader, [0], tokens=2, tokenizer=None)[0].text == " ".join(map(str, held[0][:2]))
    with pytest.raises(DataError, match="wanted document 2, found the documents 0 to 1; give one of them"):
        excerpts(reader, [2], tokens=6, tokenizer=None)


@pytest.mark.parametrize(("total", "wanted", "found"), [(10, 3, [0, 3, 6]), (2, 3, [0, 1]), (5, 0, []), (1, 1, [0])])
def test_documents_to_show_are_spread_evenly(total, wanted, found):
    assert evenly(total, wanted) == found
