"""The tokenizer's files of an exported folder, such that transformers and megadiff read the same ids from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megadiff.data.tokenizers import Tokenizer
from megadiff.data.tokenizers._special import BOS_ID, EOS_ID, MASK_ID, PAD_ID, SPECIAL_TOKENS
from megadiff.errors import DataError

_KINDS = ("bos", "eos", "pad", "mask")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, source: str, *, row_length: int) -> list[str]:
    """Write the tokenizer's files; returns their names.

    A `tokenizer.json` is copied byte for byte; a mask it lacks is named in `tokenizer_config.json` alone, from where
    transformers adds it as the next id, which is the mask's. The byte tokenizer is written as a `tokenizer.json`. A
    SentencePiece model is copied, for the `sentencepiece` library to read: no transformers class gives exactly its ids.

    Args:
        source: what the run calls its tokenizer (`data.tokenizer`).
        row_length: tokens of a row.
    """
    path = Path(source)
    if source == "byte":
        (folder / "tokenizer.json").write_text(_byte_level().to_str(pretty=True), encoding="utf-8")
        beside: dict[str, Any] = {}
    elif (found := _json_of(path)) is not None:
        (folder / "tokenizer.json").write_bytes(found.read_bytes())
        beside = _config_beside(found)
    else:
        model = path if path.is_file() else next(iter(sorted(path.glob("*.model"))))
        (folder / "tokenizer.model").write_bytes(model.read_bytes())
        return ["tokenizer.model"]
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "mask": tokenizer.mask_id}
    names = {f"{kind}_token": _name(inner, ids[kind], tokenizer) for kind in _KINDS if ids[kind] is not None}
    usual = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config = {**usual, **beside, **names, "model_max_length": row_length}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def _json_of(path: Path) -> Path | None:
    inside = path / "tokenizer.json"
    return inside if inside.is_file() else path if path.suffix == ".json" else None


def _config_beside(found: Path) -> dict[str, Any]:
    beside = found.parent / "tokenizer_config.json"
    return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}


def _name(inner: tokenizers.Tokenizer, token: int | None, tokenizer: Tokenizer) -> str:
    assert token is not None
    name = inner.id_to_token(token)
    if name is not None:
        return name
    if token != inner.get_vocab_size(with_added_tokens=True):
        raise DataError(
            f"the tokenizer {tokenizer.name} has ids without a token, so its mask {token} cannot be written as a "
            "tokenizer_config.json says it; train or fetch a tokenizer that has a mask token"
        )
    return SPECIAL_TOKENS[MASK_ID]


def _byte_level() -> tokenizers.Tokenizer:
    """Byte b is id 4 + b, after the four special tokens; bytes stand as GPT-2's printable characters."""
    vocabulary = {name: place for place, name in enumerate(SPECIAL_TOKENS)}
    assert list(range(4)) == [BOS_ID, EOS_ID, PAD_ID, MASK_ID]
    vocabulary |= {character: 4 + byte for byte, character in _printable().items()}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens(list(SPECIAL_TOKENS))
    return inner


def _printable() -> dict[int, str]:
    """A printable character for every byte: itself where it has one, else the next free one from U+0100 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}
