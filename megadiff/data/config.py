"""`data:` and `batch:` of a run description."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from megadiff.config.section import Section


class SourceConfig(Section):
    """One indexed corpus; a bare string stands for its path."""

    path: str = Field(min_length=1)
    """Prefix P of `P.bin` and `P.idx`, made by tools/preprocess_data.py or by Megatron."""

    weight: float = Field(default=1.0, gt=0)
    """Share of the samples, relative to the other sources; any unit, above 0."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class DataConfig(Section):
    """Where the text comes from."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Sources to train on, blended by weight; at least one."""

    valid: tuple[SourceConfig, ...] = ()
    """Sources for the held-out ELBO, each measured alone; weights are not used."""

    vocab_size: int | None = Field(default=None, gt=1)
    """Ids of the tokenizer with the mask; checked against it, and lets `--check` work before there are data."""

    tokenizer: str = Field(min_length=1)
    """The word `byte`, a tokenizer.json or SentencePiece .model file, or a folder with one."""


class BatchConfig(Section):
    """How many sequences make a step."""

    global_sequences: int = Field(gt=0)
    """Sequences in a step over all ranks; a multiple of micro_sequences x data-parallel ranks."""

    micro_sequences: int = Field(gt=0)
    """Sequences that one rank takes through the model at once."""
