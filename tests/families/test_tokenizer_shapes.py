"""Tokenizers in the shapes people bring: the ids of training are the ids of transformers after an export."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data.tokenizers import _pipeline, load_tokenizer
from tests.fixtures.tokenizers.shapes import CHAT, CORPUS, NAMES, SHAPES, TEXTS

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")


@dataclass
class Shape:
    name: str
    source: Path
    ours: Any
    shipped: Path
    theirs: Any


@pytest.fixture(scope="module", params=SHAPES)
def shape(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    source = SHAPES[request.param](folder / "source")
    ours = load_tokenizer(source)
    (folder / "out").mkdir()
    ours.export(folder / "out", seq_length=64)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "out")
    return Shape(request.param, source, ours, folder / "out", theirs)


def never_text(tokenizer, unknown):
    return {tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} - {unknown}


def test_ids_are_the_same_in_transformers(shape):
    automatic = transformers.AutoTokenizer.from_pretrained(shape.shipped)
    ids = shape.ours.encode_batch(TEXTS)
    assert [shape.ours.encode(text) for text in TEXTS] == ids
    for tokenizer in (shape.theirs, automatic):
        assert [tokenizer(text).input_ids for text in TEXTS] == ids
        assert tokenizer(TEXTS).input_ids == ids
        assert tokenizer(TEXTS, add_special_tokens=False).input_ids == ids


def test_special_ids_are_the_same_and_text_never_yields_one(shape):
    ours, theirs = shape.ours, shape.theirs
    kinds = ("mask", "bos", "eos", "pad")
    assert [getattr(theirs, f"{kind}_token_id") for kind in kinds] == [getattr(ours, f"{kind}_id") for kind in kinds]
    assert len(theirs) == ours.vocab_size
    unknown = 0 if shape.name == "pad_is_unknown" else None
    assert {i for ids in ours.encode_batch(TEXTS) for i in ids}.isdisjoint(never_text(ours, unknown))
    assert ours.decode([ours.mask_id, *ours.encode("The cat"), ours.mask_id]).strip() == "The cat"
    assert theirs.decode(ours.encode("The cat"), skip_special_tokens=True).strip() == "The cat"


def test_bos_is_put_before_a_text_where_the_data_have_it(shape, tmp_path):
    if shape.ours.bos_id is None:
        pytest.skip("this tokenizer has no bos")
    shape.ours.export(tmp_path, seq_length=64, prepend_bos=True)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [theirs(text).input_ids for text in TEXTS] == [
        [shape.ours.bos_id, *shape.ours.encode(text)] for text in TEXTS
    ]
    assert theirs("a", add_special_tokens=False).input_ids == shape.ours.encode("a")
    assert load_tokenizer(tmp_path).fingerprint == shape.ours.fingerprint


def test_the_shipped_folder_is_the_same_tokenizer_and_ships_again(shape, tmp_path):
    again = load_tokenizer(shape.shipped)
    assert (again.fingerprint, again.vocab_size, again.mask_id) == (
        shape.ours.fingerprint,
        shape.ours.vocab_size,
        shape.ours.mask_id,
    )
    assert again.encode_batch(TEXTS) == shape.ours.encode_batch(TEXTS)
    again.export(tmp_path, seq_length=64)
    for path in sorted(shape.shipped.rglob("*")):
        if path.is_file():
            assert (tmp_path / path.relative_to(shape.shipped)).read_bytes() == path.read_bytes(), path.name


def test_transformers_saves_and_loads_it_without_a_change(shape, tmp_path):
    shape.theirs.save_pretrained(tmp_path)
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again(TEXTS).input_ids == shape.ours.encode_batch(TEXTS)


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.one_of(st.sampled_from([*NAMES, " ", "\n", "The", "-", "  "]), st.text(max_size=3)), max_size=8)
)
def test_any_text_has_the_same_ids(shape, parts):
    text = "".join(parts)
    ids = shape.ours.encode(text)
    assert shape.theirs(text).input_ids == ids
    assert set(ids).isdisjoint(never_text(shape.ours, 0 if shape.name == "pad_is_unknown" else None))
    assert all(0 <= i < shape.ours.vocab_size for i in ids)


def test_chat_templates_are_kept(shape):
    templates = {"llama2", "llama2_json", "llama3", "qwen"}
    if shape.name not in templates:
        assert shape.theirs.chat_template is None
        return
    messages = [{"role": "user", "content": "The cat"}]
    theirs = transformers.AutoTokenizer.from_pretrained(shape.shipped)
    assert theirs.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nThe cat<|im_end|>\n"
    if shape.name == "qwen":
        assert theirs.chat_template == {"default": CHAT, "tool_use": "tools: " + CHAT}
        asked = {"split_special_tokens": False}
        ids = theirs.apply_chat_template(messages, tokenizer_kwargs=asked, return_dict=False)
        assert ids[0] == theirs.convert_tokens_to_ids("<|im_start|>")


def test_settings_that_would_change_ids_are_left_behind(shape):
    config = json.loads((shape.shipped / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert {"add_bos_token", "add_eos_token", "extra_ids", "legacy", "do_lower_case"}.isdisjoint(config)
    if shape.name == "gemma":
        assert config["additional_special_tokens"] == ["<start_of_turn>", "<end_of_turn>"]


def test_sentencepiece_models_keep_the_ids_of_their_own_library(shape):
    """Texts that spell a control piece's name are not compared: a name is cut here, lest the unigram model find it."""
    path = shape.source / "tokenizer.model"
    if not path.is_file():
        pytest.skip("no SentencePiece model")
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    draw = random.Random(0)
    parts = ["The", " ", "cat", "née", "-", "a", "\n", "  ", "日", "é", "x_3", "<", "[", "1", "::", "\u2581", "\ufb01"]
    drawn = ["".join(draw.choices(parts, k=draw.randint(1, 30))) for _ in range(500)]
    texts = [text for text in [*TEXTS, *drawn] if not any(name in text for name in NAMES if name != "::")]
    assert [shape.ours.encode(text) for text in texts] == [library.encode(text) for text in texts]
    assert len(texts) > 450


def test_a_long_text_is_encoded_in_windows_as_it_is_whole(shape, monkeypatch):
    draw = random.Random(1)
    parts = [*NAMES, *TEXTS, *CORPUS[:20], " ", "\n", "e\u0301", "\U0001f600", "x" * 50]
    text = "".join(draw.choice(parts) for _ in range(400))
    whole = shape.ours.encode(text)
    monkeypatch.setattr(_pipeline, "OVERLAP_CHARACTERS", 300)
    for window in (700, 1500):
        monkeypatch.setattr(_pipeline, "WINDOW_CHARACTERS", window)
        monkeypatch.setattr(_pipeline, "WINDOW_CHARACTERS", window)
        pieces = list(shape.ours.encode_pieces(text))
        assert [i for piece in pieces for i in piece] == whole == shape.ours.encode_batch(["", text])[1]
        assert len(pieces) > 3
    periodic = "ab" * 2000 + "a" * 1000 + "\n" * 500 + "The cat"
    assert shape.ours.encode(periodic) == shape.theirs(periodic).input_ids
