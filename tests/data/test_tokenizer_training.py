import pytest

from megadiff.data import tokenizer_training
from megadiff.data.tokenizer_training import train_tokenizer
from megadiff.errors import DataError

CORPUS = [f"The cat no. {n} sat on the mat, it's {n * n}.\nThen a dog came. 日本" for n in range(200)]


@pytest.mark.parametrize("kind", tokenizer_training.TYPES)
def test_training_twice_gives_the_same_tokenizer(tmp_path, kind):
    first, second = (train_tokenizer(CORPUS, tmp_path / f"{i}", kind=kind, vocab_size=310) for i in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 310
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_bpe_cuts_numbers_into_three_digits_and_joins_common_words(tmp_path):
    tokenizer = train_tokenizer(CORPUS + ["1234567 1234567"] * 50, tmp_path / "t", kind="bpe", vocab_size=400)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["123", "456", "7"]
    assert len(tokenizer.encode(" cat")) == 1


@pytest.mark.parametrize(
    ("kind", "vocab_size", "text"),
    [
        ("bpe", 259, r"--vocab-size must be at least 260 \(four special tokens and 256 bytes\), found 259"),
        ("sentencepiece", 260, r"--vocab-size must be at least 261"),
        ("bpe", 9999, r"the corpus gives a vocabulary of \d+ at most, wanted 9999; give more text or --vocab-size \d+"),
        ("sentencepiece", 9999, r"the corpus gives a vocabulary of \d+ at most, wanted 9999; give more text or"),
        (
            "sentencepiece",
            262,
            r"the corpus's characters alone need a vocabulary of \d+, wanted 262; give --vocab-size",
        ),
        ("wordpiece", 300, r"--type must be one of bpe, sentencepiece, sentencepiece-bpe; found `wordpiece`"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused_and_leaves_nothing(tmp_path, kind, vocab_size, text):
    with pytest.raises(DataError, match=text):
        train_tokenizer(CORPUS, tmp_path / "t", kind=kind, vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_corpus_error_keeps_its_own_words(tmp_path, kind):
    def corpus():
        yield "fine"
        raise DataError("a.jsonl:2: not a JSON object")

    with pytest.raises(DataError, match=r"^a\.jsonl:2: not a JSON object$"):
        train_tokenizer(corpus(), tmp_path / "t", kind=kind, vocab_size=300)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_an_empty_corpus_is_refused(tmp_path, kind):
    with pytest.raises(DataError, match="the corpus holds no text to train a tokenizer on"):
        train_tokenizer([], tmp_path / "t", kind=kind, vocab_size=300)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine").write_text("x")
    with pytest.raises(DataError, match=r"wanted a new or empty folder, found something there"):
        train_tokenizer(CORPUS, tmp_path / "t", kind="bpe", vocab_size=300)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["mine"]


def test_sentences_lose_no_character_but_newlines():
    text = "x" * 5000 + "\n" + "日" * 2000
    pieces = list(tokenizer_training._sentences([text]))
    assert "".join(pieces) == text.replace("\n", "")
    assert max(len(piece.encode()) for piece in pieces) <= 4192
