"""Open the data of a run and check them against its tokenizer, before anything is trained on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megadiff.data.config import DataConfig, SourceConfig
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.rows import PackedRows, TrainingRows, ValidationRows
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import SHOWN_DIGITS, DataError


@dataclass(frozen=True)
class OpenData:
    """A run's data, checked."""

    train: TrainingRows
    """Rows by global sample index."""

    valid: tuple[ValidationRows, ...]
    """One per source of `data.valid`, in that order."""

    fingerprint: str
    """SHA-256 (hex) of what fixes the training rows: contents, order and weights of the sources, not their paths."""

    train_tokens: int
    """Tokens in all training sources together."""


def open_data(
    config: DataConfig, tokenizer: Tokenizer, *, seq_length: int, seed: int, valid_rows: int, full_scan: bool = False
) -> OpenData:
    """Open all sources of a run.

    Args:
        seq_length: L.
        seed: of the run; fixes the order of the rows.
        valid_rows: rows per validation source at most.
        full_scan: look at every token id now instead of some 300 spans per source; the rest is checked as it is read.

    Raises:
        DataError: files missing or damaged, made with another tokenizer, ids outside its vocabulary, less than a row.
    """
    train = [_checked(f"data.train[{i}]", source.path, tokenizer, full_scan) for i, source in enumerate(config.train)]
    valid = [_checked(f"data.valid[{i}]", source.path, tokenizer, full_scan) for i, source in enumerate(config.valid)]
    # Sources are named by place, not by path, so that moved data give the same rows.
    packed = [PackedRows(reader, seq_length, seed=seed, name=f"train.{i}") for i, reader in enumerate(train)]
    return OpenData(
        train=TrainingRows(packed, [source.weight for source in config.train], seed=seed),
        valid=tuple(
            ValidationRows(reader, seq_length, num_rows=valid_rows, name=reader.prefix.rpartition("/")[2])
            for reader in valid
        ),
        fingerprint=_fingerprint(config.train, train),
        train_tokens=sum(reader.num_tokens for reader in train),
    )


def open_validation(prefix: str, tokenizer: Tokenizer, *, seq_length: int, rows: int, key: str) -> ValidationRows:
    """Open one source to be measured, for a command that has no run description.

    Args:
        prefix: P of `P.bin` and `P.idx`.
        tokenizer: the model's.
        seq_length: L.
        rows: sequences at most.
        key: what the user gave the prefix as, for messages.

    Raises:
        DataError: as `open_data`.
    """
    remedy = "give data made with the model's tokenizer"
    reader = _checked(key, prefix, tokenizer, full_scan=False, owner="the model's", remedy=remedy)
    return ValidationRows(reader, seq_length, num_rows=rows, name=reader.prefix.rpartition("/")[2])


def _checked(
    key: str,
    prefix: str,
    tokenizer: Tokenizer,
    full_scan: bool,
    *,
    owner: str = "this run's",
    remedy: str = "set data.tokenizer to the first or preprocess the corpus with the second",
) -> IndexedReader:
    """Open a source and compare it with the tokenizer; `owner` and `remedy` are the caller's words for a mismatch."""
    try:
        reader = IndexedReader(prefix)
        made_with = reader.tokenizer_fingerprint
        if made_with is not None and made_with != tokenizer.fingerprint:
            assert reader.manifest is not None
            raise DataError(
                f"{reader.prefix}: wrong vocabulary for the data: made with tokenizer {reader.manifest.tokenizer.name} "
                f"({made_with[:SHOWN_DIGITS]}), {owner} is {tokenizer.name} "
                f"({tokenizer.fingerprint[:SHOWN_DIGITS]}); {remedy}"
            )
        reader.check_vocabulary(tokenizer.vocab_size, mask_id=tokenizer.mask_id, full=full_scan)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    return reader


def _fingerprint(sources: Sequence[SourceConfig], readers: Sequence[IndexedReader]) -> str:
    total = sum(source.weight for source in sources)
    digest = hashlib.sha256()
    for source, reader in zip(sources, readers, strict=True):
        digest.update(f"{source.weight / total:.12g} {reader.content_fingerprint()}\n".encode())
    return digest.hexdigest()
