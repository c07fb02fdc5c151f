"""Data as a run opens it, and text that two sources share: found wherever it lies, and only where it does."""

from __future__ import annotations

import numpy as np
import pytest

from megadiff.data import open
from megadiff.data.config import DataConfig
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.open import occurring_passages, open_data, open_validation, opening_fingerprint
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.corpora import random_documents, write_indexed

TOKENIZER = ByteTokenizer()


def config(train, valid=()):
    return DataConfig.model_validate({"train": train, "valid": list(valid), "tokenizer": "byte"})


def opened(found, **changes):
    options = {"seq_length": 16, "seed": 1, "valid_sequences": 4, **changes}
    return open_data(found, TOKENIZER, **options)


@pytest.fixture
def corpus(tmp_path):
    return str(write_indexed(tmp_path / "a", random_documents(60)))


def test_sources_open_with_their_sequences_and_counts(corpus):
    data = opened(config([corpus], [corpus]))
    assert data.train.sequences([0, 1]).shape == (2, 16)
    assert [(v.name, len(v)) for v in data.valid] == [("a", 4)]
    assert data.train_tokens == data.train.sources[0].reader.num_tokens


def test_the_fingerprint_follows_content_and_weights_but_not_the_place(corpus, tmp_path):
    moved = str(write_indexed(tmp_path / "moved", random_documents(60)))
    other = str(write_indexed(tmp_path / "other", random_documents(60, seed=5)))
    first = opened(config([corpus])).fingerprint
    assert opened(config([moved])).fingerprint == first
    assert opened(config([{"path": corpus, "weight": 7.0}])).fingerprint == first
    assert opened(config([other])).fingerprint != first
    assert opened(config([corpus, other])).fingerprint != opened(config([other, corpus])).fingerprint
    weighted = config([{"path": corpus, "weight": 2.0}, other])
    assert opened(weighted).fingerprint != opened(config([corpus, other])).fingerprint


def test_moved_data_give_the_same_sequences(corpus, tmp_path):
    moved = str(write_indexed(tmp_path / "moved", random_documents(60)))
    assert (
        opened(config([corpus])).train.sequences(range(9)) == opened(config([moved])).train.sequences(range(9))
    ).all()


def test_data_of_another_tokenizer_are_refused_with_both_hashes(corpus):
    other = ByteTokenizer()
    other.name, other.fingerprint = "hf_json:mine", "f" * 64
    with pytest.raises(DataError) as caught:
        open_data(config([corpus]), other, seq_length=16, seed=1, valid_sequences=4)
    text = str(caught.value)
    assert "data.train[0]: " in text
    assert "wrong vocabulary for the data: made with tokenizer byte" in text
    assert f"byte ({TOKENIZER.fingerprint[:12]}), this run's is hf_json:mine ({'f' * 12});" in text


def test_ids_outside_the_vocabulary_and_mask_ids_are_refused(tmp_path):
    write_indexed(tmp_path / "big", [[300] * 40], vocab_size=400)
    with pytest.raises(DataError, match=r"data\.valid\[0\]: .*document 0 has the token id 300 at position 0"):
        opened(config([str(write_indexed(tmp_path / "a", [[5] * 40]))], [str(tmp_path / "big")]))
    write_indexed(tmp_path / "masked", [[5, 3] * 40])
    with pytest.raises(DataError, match=r"data\.train\[0\]: .*token id 3 at position 1 \(the mask id\)"):
        opened(config([str(tmp_path / "masked")]))


def test_missing_data_are_named_with_their_key(tmp_path, corpus):
    with pytest.raises(DataError, match=r"data\.train\[1\]: .*no indexed data; wanted .*nothing\.idx"):
        opened(config([corpus, str(tmp_path / "nothing")]))


def test_data_to_be_measured_are_named_as_the_command_names_them(corpus, tmp_path):
    """No key of a run description, no remedy that only a run has."""
    with pytest.raises(DataError, match=r"^--data: .*x: no indexed data"):
        open_validation(f"{tmp_path}/x", TOKENIZER, seq_length=16, sequences=4, key="--data")
    other = ByteTokenizer()
    other.fingerprint = "f" * 64
    with pytest.raises(DataError, match=r"the model's is byte \(f{12}\); give data made with the model's tokenizer$"):
        open_validation(str(corpus), other, seq_length=16, sequences=4, key="--data")
    found = open_validation(str(corpus), TOKENIZER, seq_length=16, sequences=4, key="--data")
    wanted = open_data(config([corpus], valid=[corpus]), TOKENIZER, seq_length=16, seed=1, valid_sequences=4).valid[0]
    assert (found.sequences(range(4)) == wanted.sequences(range(4))).all()


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
