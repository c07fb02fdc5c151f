"""Text that two sources share is found wherever it lies, and text that merely looks alike is not."""

from __future__ import annotations

import numpy as np
import pytest

from megadiff.data import open
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.open import occurring_passages, opening_fingerprint
from tests.data.corpora import write_indexed

IDS = np.random.default_rng(4).integers(4, 260, size=6000).tolist()


def reader(path, ids, vocab_size=260):
    return IndexedReader(write_indexed(path, [ids[i : i + 50] for i in range(0, len(ids), 50)], vocab_size=vocab_size))


@pytest.mark.parametrize("chunk", [2**20, 1000, 129])
@pytest.mark.parametrize("part", [slice(0, 2000), slice(4000, 6000), slice(1234, 3333), slice(0, 6000), slice(70, 90)])
def test_a_part_of_the_training_text_is_found_word_for_word(tmp_path, monkeypatch, part, chunk):
    monkeypatch.setattr(open, "_CHUNK", chunk)
    train, valid = reader(tmp_path / "train", IDS), reader(tmp_path / "valid", IDS[part])
    found, tried = occurring_passages(valid, train)
    assert found == tried >= 1
    other = reader(tmp_path / "other", np.random.default_rng(5).integers(4, 260, size=2000).tolist())
    assert occurring_passages(other, train) == (0, 8)


def test_half_of_it_is_found_by_half_of_the_passages(tmp_path):
    train = reader(tmp_path / "train", IDS)
    new = np.random.default_rng(6).integers(4, 260, size=2000).tolist()
    assert occurring_passages(reader(tmp_path / "valid", IDS[:2000] + new), train) == (4, 8)


def test_types_of_other_widths_compare_by_id_and_half_a_token_differs(tmp_path):
    train, wide = reader(tmp_path / "train", IDS), reader(tmp_path / "wide", IDS[:3000], vocab_size=100_000)
    assert train.dtype != wide.dtype
    assert occurring_passages(wide, train) == (8, 8)
    assert occurring_passages(train, wide)[0] == 4
    # The bytes of 256 * n are those of n, moved by one.
    low = [10 + i % 100 for i in range(300)]
    shifted = reader(tmp_path / "shifted", [256 * value for value in low], vocab_size=60_000)
    assert occurring_passages(reader(tmp_path / "low", low, vocab_size=60_000), shifted)[0] == 0


def test_a_grown_file_opens_as_before_and_a_changed_one_does_not(tmp_path):
    before, grown = reader(tmp_path / "before", IDS[:4000]), reader(tmp_path / "grown", IDS)
    assert opening_fingerprint(before, 4000) == opening_fingerprint(grown, 4000)
    assert opening_fingerprint(grown, 4000) != opening_fingerprint(grown, 3999)
    for place in (0, 1777, 3999):
        changed = reader(tmp_path / f"changed{place}", [*IDS[:place], 5 + IDS[place] % 50, *IDS[place + 1 :]])
        assert opening_fingerprint(changed, 4000) != opening_fingerprint(before, 4000)
