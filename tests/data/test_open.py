import pytest

from megadiff.data.config import DataConfig
from megadiff.data.open import open_data, open_validation
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
