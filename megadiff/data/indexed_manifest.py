"""The manifest `P.json` beside `P.bin` and `P.idx`: the origin of the tokens, and the tokenizer that made them.

Megatron's own format has no room for these facts and its readers ignore the file; data without one can be read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from megadiff.config.section import Section
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import DataError
from megadiff.untrusted_files import UnreadableFileError, first_fault, read_bytes

MANIFEST_VERSION = 3
"""Newest version of the manifest; 2 added `idx_sha256`, 3 `spans` and what belongs to them. Older ones are read too."""

_VERSION_WITHOUT_SPANS = 2
"""Version of the manifests that are written for data without spans, which older releases read."""

_OF_CONVERSATIONS = ("spans", "chat_template")
"""Keys that are left out where they are None, so that older releases read other data."""

_MAX_MANIFEST_BYTES = 2**26

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal."""


class TokenizerFacts(Section):
    """The tokenizer that made the ids."""

    name: str
    """Name for display."""

    fingerprint: str
    """SHA-256 (hex) of the tokenizer's meaning, which decides whether data match a tokenizer."""

    vocab_size: int = Field(gt=0)
    """Number of ids V, mask included."""

    mask_id: int = Field(ge=0)
    """Id of the mask, which the data never contain."""

    bos_id: int | None
    """Id of begin-of-text, if any."""

    eos_id: int | None
    """Id of end-of-text, if any."""

    pad_id: int | None
    """Id of padding, if any."""


class InputFacts(Section):
    """One corpus file."""

    name: str
    """Name without the folder."""

    bytes: int = Field(ge=0)
    """Size in bytes as stored on disk, compressed or not."""

    sha256: Sha256
    """SHA-256 (hex) of the file as stored."""

    @field_validator("name")
    @classmethod
    def _is_a_plain_name(cls, name: str) -> str:
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise ValueError(f"wanted a file's name without its folder, found {name!r}")
        return name


class IndexedManifest(Section):
    """The content of `P.json`."""

    version: int = Field(default=_VERSION_WITHOUT_SPANS, ge=1)
    """Version of the manifest's layout."""

    tokenizer: TokenizerFacts
    """The tokenizer that made the ids."""

    documents: int = Field(ge=0)
    """Number of documents in the index."""

    tokens: int = Field(ge=0)
    """Number of tokens in the `.bin`, added bos and eos included."""

    source_bytes: int = Field(ge=0)
    """Number of UTF-8 bytes of the source text, which bits per byte need."""

    dtype: str
    """Type of the stored ids: `uint16` or `int32`."""

    bin_sha256: Sha256
    """SHA-256 (hex) of the `.bin` file."""

    idx_sha256: Sha256 | None = None
    """SHA-256 (hex) of the `.idx` file; None in a manifest of version 1."""

    appended_eod: bool
    """Whether eos ends every document."""

    prepended_bos: bool
    """Whether bos starts every document."""

    inputs: tuple[InputFacts, ...]
    """Corpus files in the order in which they were read."""

    spans: Literal["answers"] | None = None
    """Meaning of the sequences of a document: `answers` in conversations, whose first, third, fifth, ... sequence is
    given to the model and whose others it learns to predict; None where a document is one sequence."""

    chat_template: Sha256 | None = None
    """SHA-256 (hex) of the chat template that made text of messages; None of data without one, or from before it was
    recorded."""

    @model_validator(mode="after")
    def _spans_have_their_version(self) -> IndexedManifest:
        if self.spans is not None and self.version < MANIFEST_VERSION:
            raise ValueError(f"spans need a manifest of version {MANIFEST_VERSION}, found {self.version}")
        return self

    @model_serializer(mode="wrap")
    def _without_unset_spans(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        return {key: value for key, value in tree.items() if key not in _OF_CONVERSATIONS or value is not None}


def tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    """Return a tokenizer's entry in the manifest."""
    return TokenizerFacts(
        name=tokenizer.name,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )


def manifest_bytes(manifest: IndexedManifest) -> bytes:
    """Return the file's content: JSON, identical for identical facts."""
    return orjson.dumps(manifest.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def read_manifest(path: Path) -> IndexedManifest | None:
    """Return the content of `P.json`; None if there is no such file.

    Raises:
        DataError: the file is not a manifest, or has a newer version.
    """
    try:
        found = orjson.loads(read_bytes(path, max_bytes=_MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        return None
    except UnreadableFileError as error:
        raise DataError(f"{path}: the manifest {error}; make the data again") from error
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read ({error.strerror}); check its permissions") from error
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: the manifest is not JSON ({error}); make the data again or remove it") from error
    version = found.get("version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > MANIFEST_VERSION:
        newest = f"wanted a manifest of version {MANIFEST_VERSION} at most"
        raise DataError(f"{path}: {newest}, found {version}; upgrade megadiff")
    try:
        return IndexedManifest.model_validate(found)
    except ValidationError as error:
        key, rule = first_fault(error)
        raise DataError(f"{path}: `{key}` in the manifest: {rule}; make the data again or remove it") from error
