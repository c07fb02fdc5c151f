"""`P.json` beside `P.bin` and `P.idx`: where indexed tokens come from and which tokenizer gave them.

Megatron's own format has no room for these facts and its readers ignore the file; data without one are read too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
from pydantic import Field, ValidationError, field_validator

from megadiff.config.section import Section
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import DataError
from megadiff.untrusted_files import UnreadableFileError, read_bytes

MANIFEST_VERSION = 2
"""2 has `idx_sha256`; files of version 1, which lack it, are read too."""

_MAX_MANIFEST_BYTES = 2**26

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""In hexadecimal."""


class TokenizerFacts(Section):
    """The tokenizer that made the ids."""

    name: str
    """For people."""

    fingerprint: str
    """SHA-256 (hex) of its meaning; what decides whether data fit a tokenizer."""

    vocab_size: int = Field(gt=0)
    """V, the mask included."""

    mask_id: int = Field(ge=0)
    """The mask, which the data never hold."""

    bos_id: int | None
    """Begin of text, where there is one."""

    eos_id: int | None
    """End of text, where there is one."""

    pad_id: int | None
    """Padding, where there is one."""


class InputFacts(Section):
    """One corpus file."""

    name: str
    """Without its folder."""

    bytes: int = Field(ge=0)
    """As it lies on disk, compressed or not."""

    sha256: Sha256
    """Of the same bytes."""

    @field_validator("name")
    @classmethod
    def _is_a_plain_name(cls, name: str) -> str:
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise ValueError(f"wanted a file's name without its folder, found {name!r}")
        return name


class IndexedManifest(Section):
    """Everything in `P.json`."""

    version: int = Field(default=MANIFEST_VERSION, ge=1)
    """Of this file's layout."""

    tokenizer: TokenizerFacts
    """The tokenizer that made the ids."""

    documents: int = Field(ge=0)
    """Documents in the index."""

    tokens: int = Field(ge=0)
    """Tokens in the `.bin`, added bos and eos included."""

    source_bytes: int = Field(ge=0)
    """UTF-8 bytes of the text behind them: bits per byte needs it."""

    dtype: str
    """`uint16` or `int32`."""

    bin_sha256: Sha256
    """Of the `.bin` file."""

    idx_sha256: Sha256 | None = None
    """Of the `.idx` file; None in a manifest of version 1."""

    appended_eod: bool
    """Whether eos ends every document."""

    prepended_bos: bool
    """Whether bos starts every document."""

    inputs: tuple[InputFacts, ...]
    """Corpus files in the order read."""


def tokenizer_facts(tokenizer: Tokenizer) -> TokenizerFacts:
    """What the manifest says of a tokenizer."""
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
    """The file's content: JSON, the same for the same facts."""
    return orjson.dumps(manifest.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def read_manifest(path: Path) -> IndexedManifest | None:
    """Read `P.json`; None where there is no such file.

    Raises:
        DataError: the file is no manifest, or one of a newer version.
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
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(f"{path}: `{key}` in the manifest: {first['msg']}; make the data again or remove it") from error
