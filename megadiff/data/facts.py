"""The file `data.json` of a run folder: facts about the data of a run's last attempt, for reports and replays."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megadiff.files import write_atomically

NAME = "data.json"
_MAX_BYTES = 2**24


class SourceFacts(BaseModel):
    """A training source."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    key: str
    """Entries of the configuration that name it, such as `data.train[0]`."""
    source: str
    """Shortest suffix of its path that distinguishes it from the other sources; its name in `metrics.jsonl`."""
    tokens: int = Field(ge=0)
    sequences: int = Field(ge=0)
    """Number of sequences in an epoch."""
    share: float
    """Share of the samples, from 0 to 1."""
    epochs_now: float
    """Number of times it had been gone through when the attempt started."""
    epochs_at_end: float
    """Number of times it will have been gone through at the end of the run."""


class ValidationFacts(BaseModel):
    """A validation source."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    key: str
    """Entry of the configuration that names it, such as `data.valid[0]`."""
    source: str
    """Last part of its path; its name in `metrics.jsonl`."""
    tokens: int = Field(ge=0)
    sequences: int = Field(ge=0)
    """Number of sequences available."""
    measured: int = Field(ge=0)
    """Number of sequences that an evaluation uses."""
    measured_tokens: int = Field(ge=0)
    """Number of tokens in those sequences."""


class DataFacts(BaseModel):
    """A run's data as an attempt found them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int = Field(ge=0)
    """Number of steps that the run had taken when the attempt started."""
    fingerprint: str
    """SHA-256 (hex) of the mixture: contents, order and weights of its sources."""
    train: list[SourceFacts]
    valid: list[ValidationFacts]
    advice: list[str]
    """Likely mistakes, one sentence each."""
    vocab_size: int | None = Field(default=None, gt=0)
    """Number of token ids, the mask included; None in files of older runs."""


def write_data_facts(folder: Path, facts: DataFacts) -> None:
    """Replace the `data.json` of a run folder in one step.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(folder / NAME, facts.model_dump_json(indent=1) + "\n", is_durable=False)


def read_data_facts(folder: Path) -> DataFacts | None:
    """Return the facts recorded by a run's last attempt; None if there is no readable `data.json`."""
    try:
        with (folder / NAME).open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        return DataFacts.model_validate_json(text) if len(text) <= _MAX_BYTES else None
    except (OSError, ValidationError, RecursionError):
        return None
