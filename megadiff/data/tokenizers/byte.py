"""The byte tokenizer: UTF-8 byte b is id 4 + b; bos 0, eos 1, pad 2, mask 3; V = 260. Its path is the word `byte`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from megadiff.data.tokenizers._special import BOS_ID, EOS_ID, MASK_ID, PAD_ID
from megadiff.errors import DataError

_FIRST_BYTE_ID = 4
_PIECE_CHARACTERS = 2**18


def accepts(path: str) -> bool:
    """Whether a path means this tokenizer."""
    return path == "byte"


def build(path: str) -> ByteTokenizer:
    """The byte tokenizer; it needs no file."""
    del path
    return ByteTokenizer()


class ByteTokenizer:
    """See the module's text; the protocol is `megadiff.data.tokenizers.Tokenizer`."""

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

    def encode(self, text: str) -> list[int]:
        """Return one id per UTF-8 byte."""
        try:
            return [byte + _FIRST_BYTE_ID for byte in text.encode("utf-8")]
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds a lone surrogate at character {error.start}; give valid Unicode"
            ) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield `encode` of a text a stretch of characters at a time."""
        for start in range(0, len(text), _PIECE_CHARACTERS):
            yield self.encode(text[start : start + _PIECE_CHARACTERS])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids; ids that are no byte are left out."""
        known = (int(i) - _FIRST_BYTE_ID for i in ids)
        return bytes(byte for byte in known if 0 <= byte < 256).decode("utf-8", errors="replace")
