"""A Hugging Face `tokenizer.json`, alone or in its folder, read by the `tokenizers` library; nothing of it is run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import tokenizers

from megadiff.data.tokenizers._pipeline import Pipeline, applied, unknown_id, without_specials_in_text
from megadiff.data.tokenizers._special import SpecialIds, find_special_ids, model_behind
from megadiff.data.transformers_tokenizer import write_transformers_tokenizer
from megadiff.errors import DataError, shown
from megadiff.files import UnreadableFileError, parse_json, read_json_object, read_text, type_name, why

_FILE = "tokenizer.json"
_MAX_BYTES = 2**28


def accepts(path: str) -> bool:
    """Return whether a path means this tokenizer: a `.json` file, or a folder with `tokenizer.json` in it.

    A folder whose `tokenizer.json` was made from the SentencePiece model beside it is that model's.
    """
    return path.endswith(".json") or ((Path(path) / _FILE).is_file() and model_behind(Path(path)) is None)


def build(path: str) -> HfJsonTokenizer:
    """Return the tokenizer; raise a `DataError` if it is missing or damaged."""
    return HfJsonTokenizer(Path(path) / _FILE if Path(path).is_dir() else Path(path))


class HfJsonTokenizer(Pipeline):
    """A `tokenizer.json` as a `megadiff.data.tokenizers.Tokenizer`.

    Truncation, padding and templates stored in the file are not applied. Which tokens are bos, eos, pad and mask is
    read from a `tokenizer_config.json` beside the file where there is one, else known by their usual names; a mask that
    the vocabulary lacks gets the first id past it.
    """

    def __init__(self, path: Path) -> None:
        definition, inner = _read(path)
        vocabulary = inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(
                f"{path}: wanted a tokenizer with a vocabulary, found an empty one; train or fetch it again"
            )
        ids = find_special_ids(
            inner.token_to_id, max(vocabulary.values()) + 1, _said_beside(path), unknown=unknown_id(definition, inner)
        )
        if ids.mask not in vocabulary.values() and len(set(vocabulary.values())) < len(vocabulary):
            raise DataError(
                f"{path}: two tokens have one id, so no mask can be added behind them; give each an id of its own"
            )
        try:
            plain = without_specials_in_text(definition, inner, ids, vocabulary)
            super().__init__(plain, ids, inner=inner if plain is definition else None)
        except Exception as error:  # of a file that the library reads and that is put together in some other way
            reason = str(error)[:300]
            raise DataError(f"{path}: not a whole tokenizer.json ({reason}); train or fetch it again") from error
        self.name = f"hf_json:{path.parent.name or path.name}"
        self.export_limits: str | None = None
        self._source = path.parent
        self.fingerprint = _fingerprint(plain, ids)
        self.vocab_size, self.mask_id = ids.vocab_size, ids.mask
        self.bos_id, self.eos_id, self.pad_id = ids.bos, ids.eos, ids.pad

    def export(self, folder: Path, *, seq_length: int | None = None, prepend_bos: bool = False) -> list[str]:
        """Write the `tokenizer.json`, with the chat templates and the settings that lie beside it."""
        return write_transformers_tokenizer(
            folder, self, self.definition, seq_length=seq_length, prepend_bos=prepend_bos, source=self._source
        )


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
    """Return the names of bos, eos, pad and mask in `tokenizer_config.json`: {"mask": "<mask>", ...}."""
    beside = path.parent / "tokenizer_config.json"
    if not os.path.lexists(beside):
        return {}
    try:
        config = read_json_object(beside, max_bytes=_MAX_BYTES)
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{beside} {why(error)}; correct or remove it") from error
    declared: dict[str, str] = {}
    for kind in ("mask", "bos", "eos", "pad"):
        token = config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            if any("\ud800" <= character <= "\udfff" for character in token):
                raise DataError(f"{beside}: {kind}_token is {shown(token)}, no valid Unicode; correct or remove it")
            declared[kind] = token
    return declared


def _fingerprint(definition: dict[str, Any], ids: SpecialIds) -> str:
    """Return the SHA-256 of the meaning of the file: not its spacing, key order, or settings that are not applied."""
    declared = [ids.vocab_size, ids.mask, ids.bos, ids.eos, ids.pad]
    return hashlib.sha256(json.dumps([applied(definition), declared], sort_keys=True).encode("utf-8")).hexdigest()
