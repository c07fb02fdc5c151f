"""Texts of single tokens: joined they are the text of the sequence, special tokens have names."""

from __future__ import annotations

import numpy as np
import pytest

from megadiff.data.tokenizers import MASK, load_tokenizer, token_text, token_texts
from megadiff.data.tokenizers.byte import ByteTokenizer
from tests.support.commands import REPOSITORY

TEXT = "a\u00e9\u20ac\U0001f600b  the end of the text \u6570\u5b66"


@pytest.fixture(scope="module", params=["byte", "bpe", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    if request.param == "byte":
        return ByteTokenizer()
    from megadiff.data.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    train_tokenizer(corpus, folder / "made", vocab_size=400, kind=request.param)
    return load_tokenizer(str(folder / "made"))


def test_joined_they_are_the_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_belongs_to_the_last():
    tokenizer = ByteTokenizer()
    assert token_texts(tokenizer, tokenizer.encode("a\u20acb")) == ["a", "", "", "\u20ac", "b"]


def test_special_tokens_have_names_and_cut_characters_are_marked():
    tokenizer = ByteTokenizer()
    cut = tokenizer.encode("\u20ac")[:2]
    ids = [tokenizer.bos_id, *cut, tokenizer.mask_id, *tokenizer.encode("x"), tokenizer.eos_id]
    assert token_texts(tokenizer, ids) == ["\u27e8bos\u27e9", "", "\ufffd", MASK, "x", "\u27e8eos\u27e9"]
    assert token_texts(tokenizer, cut) == ["", "\ufffd"]


def test_any_ids_have_texts(tokenizer):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 400).tolist()
    texts = token_texts(tokenizer, ids)
    look = token_text(tokenizer)
    assert all(text == look(token) for token, text in zip(ids, texts, strict=True) if token in special)
    plain = [token for token in ids if token not in special and tokenizer.decode([token]).isascii()]
    assert "".join(token_texts(tokenizer, plain)) == tokenizer.decode(plain)
