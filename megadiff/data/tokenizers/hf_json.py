"""A Hugging Face `tokenizer.json`, alone or in its folder, read by the `tokenizers` library; nothing of it is run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megadiff.data.tokenizers._special import SpecialIds, find_special_ids, split_until_plain
from megadiff.errors import DataError, shown
from megadiff.untrusted_files import UnreadableFileError, parse_json, read_json_object, read_text, type_name, why

_FILE = "tokenizer.json"
_MAX_BYTES = 2**28


def accepts(path: str) -> bool:
    """Whether a path means this tokenizer: a `.json` file, or a folder with `tokenizer.json` in it."""
    return path.endswith(".json") or (Path(path) / _FILE).is_file()


def build(path: str) -> HfJsonTokenizer:
    """Read the tokenizer; `DataError` where it is missing or damaged."""
    return HfJsonTokenizer(Path(path) / _FILE if Path(path).is_dir() else Path(path))


class HfJsonTokenizer:
    """See `megadiff.data.tokenizers.Tokenizer`. Truncation, padding and templates stored in the file are not applied.

    Which tokens are bos, eos, pad and mask is read from a `tokenizer_config.json` beside the file where there is
    one, else known by their usual names; a mask that the vocabulary lacks gets the first id past it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        definition, self._inner = _read(path)
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # `<|mask|>` in a text is six characters of text, not the mask
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(
                f"{path}: wanted a tokenizer with a vocabulary, found an empty one; train or fetch it again"
            )
        self._live = frozenset(vocabulary.values())
        ids = find_special_ids(self._inner.token_to_id, max(self._live) + 1, _said_beside(path))
        self._special = ids.all
        self.name = f"hf_json:{path.parent.name or path.name}"
        self.fingerprint = _fingerprint(definition, ids)
        self.vocab_size, self.mask_id = ids.vocab_size, ids.mask
        self.bos_id, self.eos_id, self.pad_id = ids.bos, ids.eos, ids.pad

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without specials."""
        return self._plain(text, self._encoded(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; the library uses all cores unless TOKENIZERS_PARALLELISM=false."""
        try:
            encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            return [self.encode(text) for text in texts]  # the one at fault is named there
        return [self._plain(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of any ids; special and unknown ones are left out."""
        known = [int(i) for i in ids if int(i) in self._live and int(i) not in self._special]
        return self._inner.decode(known, skip_special_tokens=True)

    def _encoded(self, text: str) -> list[int]:
        try:
            return self._inner.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise DataError(f"{text[:40]!r} cannot be tokenized: it is no valid Unicode text") from error

    def _plain(self, text: str, ids: list[int]) -> list[int]:
        if self._special.isdisjoint(ids):
            return ids
        return split_until_plain(text, self._encoded, self._special, self._inside_special)

    def _inside_special(self, text: str) -> int | None:
        encoding = self._inner.encode(text, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._special:
                return (start + end) // 2 if end - start > 1 else None
        return None


def _read(path: Path) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    try:
        text = read_text(path, max_bytes=_MAX_BYTES)
        definition = parse_json(text)
        if not isinstance(definition, dict):
            raise UnreadableFileError(f"is not a JSON object but {type_name(definition)}")
        inner = tokenizers.Tokenizer.from_str(text)
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read ({error.strerror}); check data.tokenizer") from error
    except UnreadableFileError as error:
        raise DataError(f"{path}: not a whole tokenizer.json (it {error}); train or fetch it again") from error
    except Exception as error:  # the library raises bare Exception for a file it cannot understand
        raise DataError(f"{path}: not a whole tokenizer.json ({str(error)[:300]}); train or fetch it again") from error
    return definition, inner


def _said_beside(path: Path) -> dict[str, str]:
    """What `tokenizer_config.json` calls bos, eos, pad and mask: {"mask": "<mask>", ...}."""
    beside = path.parent / "tokenizer_config.json"
    if not os.path.lexists(beside):
        return {}
    try:
        config = read_json_object(beside, max_bytes=_MAX_BYTES)
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{beside} {why(error)}; correct or remove it") from error
    said: dict[str, str] = {}
    for kind in ("mask", "bos", "eos", "pad"):
        token = config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            if any("\ud800" <= character <= "\udfff" for character in token):
                raise DataError(f"{beside}: {kind}_token is {shown(token)}, no valid Unicode; correct or remove it")
            said[kind] = token
    return said


def _fingerprint(definition: dict[str, Any], ids: SpecialIds) -> str:
    """SHA-256 over the meaning of the file: not its spacing, key order, or settings that are not applied."""
    applied = {
        key: value for key, value in definition.items() if key not in ("truncation", "padding", "post_processor")
    }
    said = [ids.vocab_size, ids.mask, ids.bos, ids.eos, ids.pad]
    return hashlib.sha256(json.dumps([applied, said], sort_keys=True).encode("utf-8")).hexdigest()
