"""The byte tokenizer: UTF-8 byte b is id 4 + b; bos 0, eos 1, pad 2, mask 3; V = 260. Its path is the word `byte`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from megadiff.data.tokenizers._special import BOS_ID, EOS_ID, MASK_ID, PAD_ID, SPECIAL_TOKENS
from megadiff.data.transformers_tokenizer import write_transformers_tokenizer
from megadiff.errors import DataError

_FIRST_BYTE_ID = 4
_PIECE_CHARACTERS = 2**16


def accepts(path: str) -> bool:
    """Return whether a path means this tokenizer."""
    return path == "byte"


def build(path: str) -> ByteTokenizer:
    """Return the byte tokenizer, which needs no file."""
    del path
    return ByteTokenizer()


class ByteTokenizer:
    """UTF-8 bytes as ids, see above; the protocol is `megadiff.data.tokenizers.Tokenizer`."""

    def __init__(self) -> None:
        self.name = "byte"
        self.fingerprint = hashlib.sha256(
            b"megadiff byte tokenizer: bos 0, eos 1, pad 2, mask 3, byte b at 4 + b"
        ).hexdigest()
        self.vocab_size = _FIRST_BYTE_ID + 256
        self.mask_id = MASK_ID
        self.bos_id: int | None = BOS_ID
        self.eos_id: int | None = EOS_ID
        self.pad_id: int | None = PAD_ID

        self.special_names: Sequence[str] = SPECIAL_TOKENS
        self.export_limits: str | None = None

    def with_special_names(self) -> tokenizers.Tokenizer:
        """Return the library's tokenizer for texts in which the name of a special token means the token."""
        return _byte_level()

    def encode(self, text: str) -> list[int]:
        """Return one id per UTF-8 byte."""
        try:
            return [byte + _FIRST_BYTE_ID for byte in text.encode("utf-8")]
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds a lone surrogate at character {error.start}; give valid Unicode"
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield `encode` of a text a stretch of characters at a time."""
        for start in range(0, len(text), _PIECE_CHARACTERS):
            yield self.encode(text[start : start + _PIECE_CHARACTERS])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of any ids; ids that are no byte are left out."""
        known = (int(i) - _FIRST_BYTE_ID for i in ids)
        return bytes(byte for byte in known if 0 <= byte < 256).decode("utf-8", errors="replace")

    def export(self, folder: Path, *, seq_length: int | None = None, prepend_bos: bool = False) -> list[str]:
        """Write a `tokenizer.json` with the same ids, and its configuration."""
        definition = json.loads(_byte_level().to_str())
        return write_transformers_tokenizer(folder, self, definition, seq_length=seq_length, prepend_bos=prepend_bos)


def _byte_level() -> tokenizers.Tokenizer:
    """Return the library's tokenizer with the same ids; bytes are written as GPT-2's printable characters."""
    vocabulary = {name: place for place, name in enumerate(SPECIAL_TOKENS)}
    assert list(range(4)) == [BOS_ID, EOS_ID, PAD_ID, MASK_ID]
    vocabulary |= {character: _FIRST_BYTE_ID + byte for byte, character in _printable().items()}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens(list(SPECIAL_TOKENS))
    return inner


def _printable() -> dict[int, str]:
    """Return a printable character for every byte: itself where it has one, else the next free one from U+0100 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(0x100 + place) for place, byte in enumerate(others)}
