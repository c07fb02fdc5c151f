"""The tokenizer family: text to token ids and back, one module a member; finding a tokenizer by the path that a run
description gives; texts of single tokens.

A module here offers `accepts(path) -> bool` and `build(path) -> Tokenizer`, and `data.tokenizer` is a path that one of
them accepts, or its name and a path (`hf_json:path`). A module of the user's own is named by its dotted path, with an
argument behind a colon if it wants one (`mypkg.words:vocabulary.txt`), and offers `build(argument) -> Tokenizer`.
Files that begin with `_` are no members. `load_tokenizer` decides which member is meant;
`megadiff.testing.check_tokenizer` is the contract as a test.

A tokenizer of the user's own needs `vocab_size`, `mask_id`, `fingerprint`, `encode(text)` and `decode(ids)`. It may
leave out: `bos_id`, `eos_id` and `pad_id` (there is none), `unknown_id` (id of unknown text, where that is a special id
as well), `name` (the dotted path), `special_names` (none), `encode_batch` and `encode_pieces` (`encode` is called), and
`export` (the tokenizer then cannot be exported). The ids of every text are checked, since one that is special or out of
range would spoil training without a sign.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megadiff.config import registry
from megadiff.config.suggestions import similar_path
from megadiff.errors import ConfigError, DataError, MegadiffError

if TYPE_CHECKING:
    from megadiff.data.config import DataConfig


class Tokenizer(Protocol):
    """Text to token ids and back. Ids are 0 .. vocab_size - 1, and the mask is one of them.

    Text never yields the mask, bos, eos or pad id, not even where it spells one of their names; an id that is the
    unknown token as well, as the padding of some tokenizers is, means unknown text and may occur.
    """

    name: str
    """Name for people: the member's and, where there is one, the file's."""

    fingerprint: str
    """SHA-256 (hex) of everything that decides the ids of a text and the special ids; the same on every machine."""

    vocab_size: int
    """Number of real ids V, the mask among them; entries that only pad a weight matrix are not counted."""

    mask_id: int
    """Id of the mask, which text can never yield."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    @property
    def special_names(self) -> Sequence[str]:
        """Names of special tokens, which are ordinary text where a text spells them."""
        ...

    @property
    def export_limits(self) -> str | None:
        """Reason why Transformers cannot give the same ids from what `export` writes; None if it can."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing put before or after it.

        Raises:
            DataError: the text is no valid Unicode, or has no ids.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text, faster."""
        ...

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of `encode` piece by piece, so that those of a long text are never all held as Python lists."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of any ids below V, in any order, without special ones; broken UTF-8 becomes U+FFFD."""
        ...

    def export(self, folder: Path, *, seq_length: int | None = None, prepend_bos: bool = False) -> list[str]:
        """Write the tokenizer's files into the folder of an exported model and return their names.

        If `export_limits` is None, Transformers' `PreTrainedTokenizerFast` reads the ids of training from them.

        Args:
            folder: an existing folder without such files.
            seq_length: number of tokens of a sequence.
            prepend_bos: whether the training data begin each document with bos.

        Raises:
            DataError: the tokenizer cannot be exported; nothing was written.
        """
        ...


MASK = "\u2591"
"""Text of the mask."""

BROKEN = "\ufffd"
"""Text of bytes that are no UTF-8."""

_LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens that one character can take


def special_texts(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the texts that are shown of ids without text: those of bos, eos, pad and the mask."""
    named = {tokenizer.bos_id: "bos", tokenizer.eos_id: "eos", tokenizer.pad_id: "pad"}
    texts = {token: f"\u27e8{name}\u27e9" for token, name in named.items() if token is not None}
    return {**texts, tokenizer.mask_id: MASK}


def token_text(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return a function from an id to its text amid others: with the space before it, or its name if it has no text."""
    special = special_texts(tokenizer)

    @cache
    def text(token: int) -> str:
        if token in special:
            return special[token]
        alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone

    return text


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token amid those before it, with its leading space.

    Joined, they are the text of the sequence. A character that several tokens form together belongs to the last of
    them, and the others have an empty text; bytes that form none become U+FFFD.

    Args:
        tokenizer: the tokenizer.
        ids: [n] ids below V, noise among them.
    """
    special, texts = special_texts(tokenizer), [""] * len(ids)
    start = done = 0  # ids[start:done] are shown, and what follows is decoded behind them
    for place, token in enumerate(ids):
        if token in special:
            if done < place:  # the character before it stays unfinished
                texts[place - 1] = BROKEN
            texts[place], start, done = special[token], place + 1, place + 1
            continue
        before, after = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start : place + 1])
        is_open = after.endswith(BROKEN) and place - done + 1 < _LONGEST_CHARACTER
        if is_open and place + 1 < len(ids):
            continue
        texts[place] = after[len(before) :] if after.startswith(before) else tokenizer.decode(ids[done : place + 1])
        start, done = done, place + 1
    return texts


_NEEDED = ("vocab_size", "mask_id", "fingerprint", "encode", "decode")


class WrongIdsError(DataError):
    """The tokenizer gives a text ids that no text may have."""


class OutsideTokenizer:
    """A tokenizer of the user's own as a `megadiff.data.tokenizers.Tokenizer`.

    Raises:
        DataError: it lacks what it needs, or its special ids are none of its ids.
    """

    def __init__(self, inner: Any, path: str) -> None:
        missing = [name for name in _NEEDED if not hasattr(inner, name)]
        if missing:
            listed = ", ".join(f"`{name}`" for name in missing)
            raise DataError(f"{path}: a tokenizer needs {listed}; add what is missing to what `build` returns")
        self._inner = inner
        self.name = str(getattr(inner, "name", path))
        self.fingerprint = str(inner.fingerprint)
        self.vocab_size = int(inner.vocab_size)
        self.mask_id = int(inner.mask_id)
        self.bos_id, self.eos_id, self.pad_id = (_optional(inner, kind) for kind in ("bos_id", "eos_id", "pad_id"))
        self.special_names: Sequence[str] = tuple(getattr(inner, "special_names", ()))
        self._specials = {i for i in (self.mask_id, self.bos_id, self.eos_id, self.pad_id) if i is not None}
        self._forbidden = self._specials - {getattr(inner, "unknown_id", None)}
        if wrong := sorted(i for i in self._specials if not 0 <= i < self.vocab_size):
            raise DataError(f"{path}: the special id {wrong[0]} is not below vocab_size {self.vocab_size}; correct it")

    @property
    def export_limits(self) -> str | None:
        """Reason why it cannot be exported; None where it exports itself."""
        limits = getattr(self._inner, "export_limits", None)
        return limits if hasattr(self._inner, "export") else "it has no `export`, so its model cannot be exported"

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Raises:
            WrongIdsError: an id is special, or none of the vocabulary's, or there are no ids because `encode` failed.
        """
        with self._naming("encode", text):
            ids = self._inner.encode(text)
        return self._checked(ids, text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text."""
        if not hasattr(self._inner, "encode_batch"):
            return [self.encode(text) for text in texts]
        with self._naming("encode_batch", "".join(texts[:1])):
            pairs = list(zip(self._inner.encode_batch(texts), texts, strict=True))
        return [self._checked(ids, text) for ids, text in pairs]

    def encode_pieces(self, text: str) -> Iterator[list[int]]:
        """Yield the ids of a text in pieces, or in one where the tokenizer knows no pieces."""
        if not hasattr(self._inner, "encode_pieces"):
            yield self.encode(text)
            return
        for piece in self._inner.encode_pieces(text):
            yield self._checked(piece, text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of any ids, without special ones."""
        return self._inner.decode([int(i) for i in ids if int(i) not in self._specials])

    def export(self, folder: Path, *, seq_length: int | None = None, prepend_bos: bool = False) -> list[str]:
        """Write the files of the tokenizer, by its own `export`.

        Raises:
            DataError: it has no `export`.
        """
        if not hasattr(self._inner, "export"):
            raise DataError(
                f"the tokenizer {self.name} cannot be exported, for it has no method "
                "`export(folder, *, seq_length, prepend_bos)`; add one, such as a call of "
                "megadiff.data.transformers_tokenizer.write_transformers_tokenizer"
            )
        return list(self._inner.export(folder, seq_length=seq_length, prepend_bos=prepend_bos))

    @contextmanager
    def _naming(self, function: str, text: str) -> Iterator[None]:
        """Turn any exception of the user's code into a sentence with the text and the line that raised it."""
        try:
            yield
        except MegadiffError:
            raise
        except Exception as error:
            file = sys.modules[type(self._inner).__module__].__file__ or ""
            raise WrongIdsError(
                f"`{function}` of the tokenizer {self.name} failed at the text {text[:40]!r}: "
                f"{registry.account_of(error, file)}"
            ) from error

    def _checked(self, ids: Sequence[int], text: str) -> list[int]:
        try:
            found = [index(i) for i in ids]
        except TypeError:
            raise WrongIdsError(
                f"the tokenizer {self.name} turns the text {text[:40]!r} into something else than a list of integers"
            ) from None
        if not self._forbidden.isdisjoint(found):
            token = next(i for i in found if i in self._forbidden)
            raise WrongIdsError(
                f"the tokenizer {self.name} turns the text {text[:40]!r} into the special id {token}; a model cannot "
                "tell it from a real one"
            )
        if found and not (min(found) >= 0 and max(found) < self.vocab_size):
            token = next(i for i in found if not 0 <= i < self.vocab_size)
            raise WrongIdsError(
                f"the tokenizer {self.name} turns the text {text[:40]!r} into the id {token}, which is not below its "
                f"vocab_size {self.vocab_size}"
            )
        return found


def _optional(inner: Any, kind: str) -> int | None:
    found = getattr(inner, kind, None)
    return None if found is None else int(found)


_FAMILY = "megadiff.data.tokenizers"
_ENDINGS = (".json", ".model")


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


class Backend(NamedTuple):
    """A library that encodes batches."""

    name: str
    """`tokenizers` or `gigatoken`."""

    reason: str | None
    """Reason why it is not `gigatoken` although that would be preferred."""

    tokenizer: Tokenizer
    """The tokenizer that uses it."""


def chosen_backend(backend: str, path: str | Path, sample: Sequence[str]) -> Backend:
    """Return the library to use for a tokenizer, with the tokenizer.

    Args:
        backend: one of `BACKENDS`.
        path: as for `load_tokenizer`.
        sample: texts of the corpus.

    Raises:
        DataError: as for `load_tokenizer`; or `gigatoken` was requested, and cannot be used or gives other ids.
    """
    tokenizer = load_tokenizer(path)
    if backend == "tokenizers":
        return Backend(backend, None, tokenizer)
    from megadiff.data.tokenizers._gigatoken import UnfitError, with_gigatoken

    try:
        return Backend("gigatoken", None, with_gigatoken(tokenizer, sample=sample))
    except UnfitError as error:
        if backend == "gigatoken":
            remedy = "use --backend auto or tokenizers"
            raise DataError(f"--backend gigatoken cannot be used for {path}: {error}; {remedy}") from error
        return Backend("tokenizers", str(error), tokenizer)


def load_for_batches(path: str | Path, backend: str) -> Tokenizer:
    """Return a tokenizer that encodes batches by the library that `chosen_backend` returned, in a process of its own.

    Args:
        path: as for `load_tokenizer`.
        backend: `tokenizers` or `gigatoken`.

    Raises:
        DataError: as for `chosen_backend`.
    """
    return chosen_backend(backend, path, ()).tokenizer


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
