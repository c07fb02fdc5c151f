"""`data:` and `batch:` of a run description."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from megadiff.config.section import Section


class SourceConfig(Section):
    """One indexed corpus; a bare string is its path."""

    path: str = Field(min_length=1)
    """Prefix P of `P.bin` and `P.idx`, made by tools/preprocess_data.py or by Megatron."""

    weight: float | None = Field(default=None, gt=0)
    """Share of the samples, relative to the other sources; any unit, above 0. Where no source has one, sources share by
    size, so that all come to the end of an epoch together; beside sources that have one, a source without counts as 1.
    """

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class DataConfig(Section):
    """Where the text comes from."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Sources to train on, blended by weight or, without weights, by size; at least one."""

    valid: tuple[SourceConfig, ...] = ()
    """Sources for the held-out ELBO, each measured alone; weights are not used."""

    vocab_size: int | None = Field(default=None, gt=1)
    """Ids of the tokenizer with the mask; checked against it, and lets `--check` work before there are data."""

    tokenizer: str = Field(min_length=1)
    """The word `byte`, a tokenizer.json or SentencePiece .model file, or a folder with one."""


class RampConfig(Section):
    """`batch.ramp: {start: 64, increment: 64, every_steps: 500}`: smaller batches first.

    The size of every stage must be a multiple of micro_sequences x data-parallel ranks.
    """

    start: int = Field(gt=0)
    """Sequences of the first steps, at most global_sequences."""

    increment: int = Field(gt=0)
    """How many sequences more with each stage, up to global_sequences."""

    every_steps: int = Field(gt=0)
    """Steps of a stage."""


class BatchConfig(Section):
    """How many sequences make a step."""

    global_sequences: int = Field(gt=0)
    """Sequences in a step over all ranks; a multiple of micro_sequences x data-parallel ranks."""

    ramp: RampConfig | None = None
    """How the global batch grows to global_sequences; leave it out for the same size throughout."""

    micro_sequences: int = Field(gt=0)
    """Sequences that one rank takes through the model at once."""

    @model_validator(mode="after")
    def _ramp_rises(self) -> BatchConfig:
        if self.ramp is not None and self.ramp.start > self.global_sequences:
            raise ValueError(
                f"batch.ramp.start is {self.ramp.start}, above batch.global_sequences = {self.global_sequences}, where "
                "the ramp ends; lower it, or leave the ramp out"
            )
        return self
