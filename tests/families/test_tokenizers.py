"""The contract of every tokenizer in megadiff/data/tokenizers; a new member needs one line in EXAMPLES."""

import shutil
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.config import registry
from megadiff.data.tokenizer_training import train_tokenizer
from megadiff.data.tokenizers import load_tokenizer
from megadiff.data.tokenizers._special import SPECIAL_TOKENS
from megadiff.errors import DataError
from megadiff.testing import check_tokenizer

CORPUS = [f"The cat no. {n} sat on the mat, it's née {n * n}.\nThen <|mask|> came. 日本" for n in range(300)]

EXAMPLES = {
    "byte": lambda folder: "byte",
    "hf_json": lambda folder: _trained(folder, "bpe"),
    "sentencepiece_model": lambda folder: _trained(folder, "sentencepiece"),
}


def _trained(folder, kind):
    train_tokenizer(CORPUS, folder, kind=kind, vocab_size=320)
    return folder


def test_every_member_is_under_contract():
    assert sorted(EXAMPLES) == registry.names("megadiff.data.tokenizers")


@pytest.fixture(scope="module", params=sorted(EXAMPLES))
def path(request, tmp_path_factory):
    return EXAMPLES[request.param](tmp_path_factory.mktemp("tokenizer") / request.param)


@pytest.fixture(scope="module")
def tokenizer(path):
    return load_tokenizer(path)


texts = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])).map(
    lambda text: unicodedata.normalize("NFC", text)
)


def test_it_holds_the_contract(path):
    check_tokenizer(path, is_lossless=path == "byte", texts=CORPUS[:3])


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(SPECIAL_TOKENS), st.text(max_size=4)), max_size=6))
def test_text_never_yields_a_special_id_even_where_it_spells_one(tokenizer, parts):
    text = unicodedata.normalize("NFC", "".join(parts).replace("\u2581", "_"))
    ids = tokenizer.encode(text)
    assert {tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}.isdisjoint(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    several = ["", "a b", "<|mask|> é\n\n", "x" * 300]
    assert tokenizer.encode_batch(several) == [tokenizer.encode(text) for text in several]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_below_v_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert isinstance(tokenizer.decode(ids), str)


def test_special_ids_are_pinned_and_decode_to_nothing(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (0, 1, 2, 3)
    plain = tokenizer.encode("a")
    assert tokenizer.decode([0, *plain, 3, 2, *plain, 1]) == "aa"


def test_every_id_is_below_v_and_the_last_one_is_real(tokenizer):
    assert tokenizer.vocab_size == (260 if tokenizer.name == "byte" else 320)


def test_a_lone_surrogate_is_refused(tokenizer):
    for call in (lambda: tokenizer.encode("a\ud800"), lambda: tokenizer.encode_batch(["fine", "a\ud800"])):
        with pytest.raises(DataError, match=r"lone surrogate|no valid Unicode"):
            call()


def test_the_fingerprint_is_the_same_wherever_the_files_lie(path, tokenizer, tmp_path):
    assert len(bytes.fromhex(tokenizer.fingerprint)) == 32
    if path != "byte":
        shutil.copytree(path, tmp_path / "elsewhere")
        path = tmp_path / "elsewhere"
    assert load_tokenizer(path).fingerprint == tokenizer.fingerprint
