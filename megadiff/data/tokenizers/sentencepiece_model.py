"""A SentencePiece `*.model` file, alone or the only one in its folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from megadiff.data.tokenizers._special import SpecialIds, find_special_ids, split_until_plain
from megadiff.errors import DataError
from megadiff.untrusted_files import UnreadableFileError, read_bytes

_MAX_BYTES = 2**28


def accepts(path: str) -> bool:
    """Whether a path means this tokenizer: a `.model` file, or a folder with one and no `tokenizer.json`."""
    folder = Path(path)
    return path.endswith(".model") or (any(folder.glob("*.model")) and not (folder / "tokenizer.json").is_file())


def build(path: str) -> SentencePieceTokenizer:
    """Read the model; `DataError` where it is missing, damaged, or not the only one in its folder."""
    if not Path(path).is_dir():
        return SentencePieceTokenizer(Path(path))
    found = sorted(Path(path).glob("*.model"))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found)
        raise DataError(f"{path}: wanted one .model file, found {len(found)} ({listed}); name the file itself")
    return SentencePieceTokenizer(found[0])


class SentencePieceTokenizer:
    """See `megadiff.data.tokenizers.Tokenizer`. A mask that the model lacks gets the first id past its pieces."""

    def __init__(self, path: Path) -> None:
        try:
            model = read_bytes(path, max_bytes=_MAX_BYTES)
        except OSError as error:
            raise DataError(f"{path}: the tokenizer cannot be read ({error.strerror}); check data.tokenizer") from error
        except UnreadableFileError as error:
            raise DataError(f"{path}: the tokenizer {error}; check data.tokenizer") from error
        self._inner = _loaded(path, model)
        self._live = self._inner.vocab_size()
        ids = find_special_ids(self._id_of, self._live, self._declared())
        self._special = ids.all
        self._special_names = sorted((self._inner.id_to_piece(i) for i in self._special if i < self._live), key=len)
        self.name = f"sentencepiece_model:{path.parent.name or path.name}"
        self.fingerprint = _fingerprint(model, ids)
        self.vocab_size, self.mask_id = ids.vocab_size, ids.mask
        self.bos_id, self.eos_id, self.pad_id = ids.bos, ids.eos, ids.pad

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without specials."""
        return split_until_plain(text, self._encoded, self._special, self._inside_special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids; special ones are left out."""
        return self._inner.decode([int(i) for i in ids if 0 <= int(i) < self._live and int(i) not in self._special])

    def _encoded(self, text: str) -> list[int]:
        try:
            return self._inner.encode(text)
        except (RuntimeError, UnicodeEncodeError) as error:
            raise DataError(f"{text[:40]!r} cannot be tokenized: it is no valid Unicode text") from error

    def _inside_special(self, text: str) -> int | None:
        """Where to cut the first special name that the text spells."""
        places = [(text.find(name), name) for name in self._special_names if len(name) > 1 and name in text]
        return min(places)[0] + 1 if places else None

    def _id_of(self, piece: str) -> int | None:
        found = self._inner.piece_to_id(piece)
        return found if self._inner.id_to_piece(found) == piece else None  # an unknown piece is given the unk id

    def _declared(self) -> dict[str, str]:
        declared = {"bos": self._inner.bos_id(), "eos": self._inner.eos_id(), "pad": self._inner.pad_id()}
        return {kind: self._inner.id_to_piece(found) for kind, found in declared.items() if found >= 0}


def _loaded(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        inner = sentencepiece.SentencePieceProcessor(model_proto=model)
        num_pieces = inner.vocab_size()
        inner.id_to_piece(list(range(num_pieces)))  # a damaged model may load and fail on its first broken piece
        inner.decode([inner.unk_id()])
    except (RuntimeError, UnicodeDecodeError, IndexError) as error:
        raise DataError(f"{path}: not a whole SentencePiece model ({error}); train or fetch it again") from error
    if num_pieces == 0:
        raise DataError(f"{path}: wanted a SentencePiece model, found one without pieces; train or fetch it again")
    return inner


def _fingerprint(model: bytes, ids: SpecialIds) -> str:
    said = f"{ids.vocab_size} {ids.mask} {ids.bos} {ids.eos} {ids.pad} ".encode()
    return hashlib.sha256(said + model).hexdigest()
