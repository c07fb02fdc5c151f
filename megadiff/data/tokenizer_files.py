"""Tokenizers by the path that a run description gives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megadiff.config import registry
from megadiff.config.suggestions import similar_path
from megadiff.data.config import DataConfig
from megadiff.data.tokenizers import Tokenizer
from megadiff.data.tokenizers._outside import OutsideTokenizer
from megadiff.errors import ConfigError, DataError

_FAMILY = "megadiff.data.tokenizers"
_ENDINGS = (".json", ".model")


def wrong_ids(ids: np.ndarray, *, vocab_size: int | None, mask_id: int | None) -> np.ndarray:
    """Return the places in `ids` ([n], as stored) that are negative, at or above V, or the mask: [m] int64."""
    if not ids.size:
        return np.empty(0, dtype=np.int64)
    low, high = int(ids.min()), int(ids.max())
    is_mask = ids == mask_id if mask_id is not None and low <= mask_id <= high else None
    if low >= 0 and (vocab_size is None or high < vocab_size) and (is_mask is None or not is_mask.any()):
        return np.empty(0, dtype=np.int64)
    wrong = ids < 0
    if vocab_size is not None and high >= vocab_size:
        wrong |= ids >= vocab_size
    if is_mask is not None:
        wrong |= is_mask
    return np.flatnonzero(wrong)


class NoTokenizerError(DataError):
    """There is nothing where a tokenizer should be."""


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """Return a run's tokenizer.

    Raises:
        NoTokenizerError: there is none.
        DataError: it cannot be loaded.
        ConfigError: `data.vocab_size` is set and differs from its number of ids.
    """
    try:
        tokenizer = load_tokenizer(config.tokenizer)
    except DataError as error:
        raise type(error)(f"data.tokenizer: {error}") from error
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"data.vocab_size is {config.vocab_size}, but the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} ids with its mask; set it to that or leave it out"
        )
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer that a path or a name refers to.

    Args:
        path: the word `byte`; a `tokenizer.json` or its folder; a SentencePiece `.model` or its folder; a member of the
            family with its path (`hf_json:folder`); or a module of the user's own with or without an argument
            (`mypkg.words`, `mypkg.words:vocabulary.txt`). A file or folder of that name takes precedence over a module.

    Raises:
        DataError: there is nothing, no member accepts it, the file is damaged, or the module cannot be used.
    """
    given = str(path)
    if not os.path.lexists(given):
        name, colon, argument = given.partition(":")
        try:
            if _is_module(name):
                return _from_outside(given, name, argument)
            if colon and name in registry.names(_FAMILY):
                return registry.member(_FAMILY, name).build(argument)
        except ConfigError as error:
            raise DataError(str(error)) from error
    for name in registry.names(_FAMILY):
        module = registry.member(_FAMILY, name)
        if module.accepts(given):
            return module.build(given)
    wanted = (
        "the word `byte`, a tokenizer.json, a SentencePiece .model file, a folder with one of them, or a module of "
        "your own (mypkg.words)"
    )
    found = "a folder without them" if Path(given).is_dir() else "another file" if Path(given).exists() else "nothing"
    near = similar_path(given, _could_hold_one) if found == "nothing" else None
    remedy = f"did you mean {near}?" if near else "check the path or run `megadiff train_tokenizer`"
    kind = NoTokenizerError if found == "nothing" else DataError
    raise kind(f"{given}: wanted {wanted}, found {found}; {remedy}")


BACKENDS = ("tokenizers", "gigatoken", "auto")
"""Libraries that encode batches; the first is the default, and `auto` means the second where it fits."""


def chosen_backend(backend: str, path: str | Path, sample: Sequence[str]) -> tuple[str, str | None]:
    """Return the library to use for a tokenizer, and why it is not `gigatoken` although that would be preferred.

    Args:
        backend: one of `BACKENDS`.
        path: as for `load_tokenizer`.
        sample: texts of the corpus.

    Raises:
        DataError: `gigatoken` was requested, and cannot be used or gives other ids.
    """
    if backend == "tokenizers":
        return backend, None
    from megadiff.data.tokenizers._gigatoken import UnfitError, with_gigatoken

    try:
        with_gigatoken(load_tokenizer(path), parallel=False, sample=sample)
    except UnfitError as error:
        if backend == "gigatoken":
            remedy = "use --backend auto or tokenizers"
            raise DataError(f"--backend gigatoken cannot be used for {path}: {error}; {remedy}") from error
        return "tokenizers", str(error)
    return "gigatoken", None


def load_for_batches(path: str | Path, backend: str, *, parallel: bool) -> Tokenizer:
    """Return a tokenizer that encodes batches by the library that `chosen_backend` returned.

    Args:
        path: as for `load_tokenizer`.
        backend: `tokenizers` or `gigatoken`.
        parallel: whether a batch may use all cores.

    Raises:
        DataError: as for `load_tokenizer` and `chosen_backend`.
    """
    tokenizer = load_tokenizer(path)
    if backend == "tokenizers":
        return tokenizer
    from megadiff.data.tokenizers._gigatoken import with_gigatoken

    return with_gigatoken(tokenizer, parallel=parallel)


def _could_hold_one(path: Path) -> bool:
    """Return whether a path has the looks of a tokenizer's."""
    return path.is_dir() or path.suffix in _ENDINGS


def _is_module(name: str) -> bool:
    """Return whether a name is a dotted path of Python names rather than the path of a file."""
    parts = name.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts) and not name.endswith(_ENDINGS)


def _from_outside(given: str, name: str, argument: str) -> Tokenizer:
    module = registry.member(_FAMILY, name)
    if not callable(getattr(module, "build", None)):
        raise DataError(
            f"{given}: the module {name} has no function `build(argument)`; add one that returns a tokenizer"
        )
    return OutsideTokenizer(registry.call(module, "build", argument), given)
