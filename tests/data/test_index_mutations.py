"""Ten thousand ways to damage indexed data; none ends in a signal, in a full memory, or in other tokens unseen."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data.indexed_reader import IndexedReader
from tests.data.corpora import random_documents, write_indexed
from tests.data.index_mutations import EXTREMES, FIELDS, MUTATIONS, outcome, outcomes, truth_of
from tests.security.children import in_child

COUNT = 10_000


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """uint16 with small ids, uint16 with ids above 2**15, int32, and a single document."""
    folder = tmp_path_factory.mktemp("truth")
    draw = np.random.default_rng(4)
    large = [draw.integers(30_000, 65_000, size=size).tolist() for size in (3, 1, 7, 5)]
    huge = [draw.integers(4, 120_000, size=size).tolist() for size in (2, 6, 1)]
    return [
        write_indexed(folder / "small", random_documents(12, longest=6)),
        write_indexed(folder / "large", large, vocab_size=65_400),
        write_indexed(folder / "huge", huge, vocab_size=120_000),
        write_indexed(folder / "single", [[9, 8, 7, 6]]),
    ]


@pytest.fixture
def fast_folder(tmp_path):
    """In memory where there is such a place: the tests write some 25,000 small files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_no_damage_ends_in_a_signal_a_full_memory_or_wrong_tokens(corpora, fast_folder):
    met = in_child(lambda: outcomes(corpora, fast_folder, count=COUNT, seed=20_26))
    wrong = {said: times for said, times in met.items() if said.startswith("WRONG")}
    assert not wrong, wrong
    assert met.total() == COUNT
    assert min(met["refused"], met["found"], met["same"]) > COUNT // 100, met


@pytest.mark.parametrize("check", ["_checked_lengths", "_check_documents", "_check_bin_size"])
def test_the_same_damage_does_get_past_a_reader_that_lacks_one_check(corpora, fast_folder, monkeypatch, check):
    """The control: what the test above looks for is there to be found."""

    def unchecked(self):
        return self._lengths.read(0, self.num_sequences).sum() if check == "_checked_lengths" else None

    monkeypatch.setattr(IndexedReader, check, unchecked)
    met = in_child(lambda: outcomes(corpora, fast_folder, count=1000, seed=1))
    assert any(said.startswith("WRONG") for said in met), met


@settings(max_examples=300, deadline=None)
@given(
    field=st.sampled_from(sorted(FIELDS)),
    value=st.one_of(st.sampled_from(EXTREMES), st.integers(0, 2**64 - 1)),
    second=st.sampled_from([*sorted(FIELDS), None]),
    has_manifest=st.booleans(),
)
def test_any_value_of_any_header_field_is_refused_or_means_the_same(
    corpora, tmp_path_factory, field, value, second, has_manifest
):
    truth = truth_of(corpora[0])
    prefix = tmp_path_factory.getbasetemp() / "header"
    raw = bytearray(truth.content[".idx"])
    for name in (field, second):
        if name is not None:
            offset, size = FIELDS[name]
            raw[offset : offset + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    for suffix, content in {**truth.content, ".idx": bytes(raw)}.items():
        prefix.with_suffix(suffix).write_bytes(content)
    if not has_manifest:
        prefix.with_suffix(".json").unlink()
    assert outcome(prefix, truth) in ("refused", "same")


def test_every_kind_of_damage_changes_something():
    """A mutation that does nothing would make the count above a lie."""
    whole, other = bytes(range(200)), bytes(reversed(range(200)))
    for mutate in MUTATIONS:
        draw = np.random.default_rng(0)
        changed = 0
        for _ in range(50):
            raw = bytearray(whole)
            mutate(raw, draw, other)
            changed += bytes(raw) != whole
        assert changed > 25, mutate.__name__
