"""Tokenizers of an exported folder: the same ids and the same fingerprint, a mask added where the file has none."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from megadiff.data.tokenizers import load_tokenizer

WORDS = {"<s>": 0, "</s>": 1, "a": 2, "list": 3, "is": 4, "<unk>": 5}


@pytest.fixture
def source(tmp_path):
    """A `tokenizer.json` of another project's: specials by other names, and no mask."""
    inner = tokenizers.Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>"])
    (tmp_path / "source").mkdir()
    inner.save(str(tmp_path / "source/tokenizer.json"))
    return tmp_path / "source"


def test_a_missing_mask_is_the_next_id_for_both_sides(source, tmp_path):
    ours = load_tokenizer(source)
    (tmp_path / "out").mkdir()
    names = ours.export(tmp_path / "out", seq_length=16)
    assert sorted(names) == sorted(path.name for path in (tmp_path / "out").iterdir())
    wanted, found = (json.loads((folder / "tokenizer.json").read_text()) for folder in (source, tmp_path / "out"))
    assert {key for key in wanted if wanted[key] != found[key]} == {"pre_tokenizer"}  # `</s>` in a text is cut
    again = load_tokenizer(tmp_path / "out")
    assert (again.fingerprint, again.mask_id, again.vocab_size) == (ours.fingerprint, 6, 7)
    said = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert {key: said[f"{key}_token"] for key in ("bos", "eos", "mask")} == {
        "bos": "<s>",
        "eos": "</s>",
        "mask": "<|mask|>",
    }
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.mask_token_id, theirs.bos_token_id, theirs.eos_token_id) == (6, 0, 1)
    assert theirs("a list is", add_special_tokens=False).input_ids == ours.encode("a list is") == [2, 3, 4]


def test_the_byte_tokenizer_of_a_folder_has_the_bytes_ids(tmp_path):
    """As a file it is another tokenizer to us, with another fingerprint, but the same ids for every text."""
    ours = load_tokenizer("byte")
    ours.export(tmp_path, seq_length=16)
    theirs = load_tokenizer(tmp_path)
    text = "".join(map(chr, range(1, 0x250))) + "\u20ac\U0001f600"
    assert theirs.encode(text) == ours.encode(text)
    assert (theirs.vocab_size, theirs.mask_id, theirs.bos_id, theirs.eos_id, theirs.pad_id) == (260, 3, 0, 1, 2)
