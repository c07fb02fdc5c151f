"""The sections `data:` and `batch:` of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from megadiff.config.section import Section


class SourceConfig(Section):
    """One indexed corpus; a bare string is its path."""

    path: str = Field(min_length=1)
    """Prefix P of `P.bin` and `P.idx`, made by `megadiff preprocess_data` or by Megatron; or a folder of shards, made
    by `megadiff preprocess_data --shards`.
    """

    weight: float | None = Field(default=None, gt=0)
    """Share of the samples, relative to the other sources; any unit, above 0. If no source has a weight, sources
    share by size, so that all finish an epoch together; a source without a weight beside others with one counts as 1.
    """

    epochs: float | None = Field(default=None, gt=0)
    """Number of epochs of the source at the end of the run or phase, those of earlier phases included, in the place of
    a weight; sources without a budget share the other samples.
    """

    tokens: float | None = Field(default=None, gt=0)
    """Number of tokens that the source has given by the end of the run or phase, in the place of `epochs`."""

    @model_validator(mode="after")
    def _one_share(self) -> SourceConfig:
        given = [name for name in ("weight", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{self.path} has {' and '.join(given)}; give one of weight, epochs and tokens")
        return self

    @model_serializer(mode="wrap")
    def _without_unset_budgets(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = handler(self)
        return {key: value for key, value in tree.items() if value is not None or key not in ("epochs", "tokens")}

    @property
    def has_budget(self) -> bool:
        """Whether the source has a budget of epochs or tokens."""
        return self.epochs is not None or self.tokens is not None

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


def given_weights(sources: Sequence[SourceConfig]) -> list[float] | None:
    """Return the weights of sources, 1 for one without beside others with one; None if they share by size."""
    if all(source.weight is None for source in sources):
        return None
    return [1.0 if source.weight is None else source.weight for source in sources]


class PhaseConfig(Section):
    """A later phase of training, as in `{from_step: 8000, train: [data/books, data/web]}`."""

    from_step: int = Field(gt=0)
    """Number of steps taken when the phase begins."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Sources of the phase, as in `data.train`; each continues at its own next sequence."""


class DataConfig(Section):
    """The training and validation text, and its tokenizer."""

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    """Sources to train on, blended by weight or, without weights, by size; at least one."""

    phases: tuple[PhaseConfig, ...] | None = None
    """Mixtures that take the place of `data.train` from given steps on, in ascending order; unset for none."""

    valid: tuple[SourceConfig, ...] = ()
    """Sources for the validation ELBO, each evaluated separately; weights are ignored."""

    vocab_size: int | None = Field(default=None, gt=1)
    """Number of the tokenizer's ids, mask included; checked against it, and lets `--check` work before data exist."""

    tokenizer: str = Field(min_length=1)
    """The word `byte`, a tokenizer.json or SentencePiece .model file, or a folder with one."""

    padding: Literal["predicted_eos", "eos", "pad"] | None = None
    """Tokens that fill a conversation up to `model.seq_length`, needed where a source holds conversations:
    `predicted_eos`, eos that is noised and predicted like an answer, so that the model learns where answers end; or
    `eos` or `pad`, that token noise-free and without loss."""

    packing: bool = False
    """Whether several short conversations share a sequence, each of which attends to itself alone; with `padding` of
    `eos` or `pad`."""

    @model_validator(mode="after")
    def _packed_ends_are_own(self) -> DataConfig:
        if self.packing and self.padding == "predicted_eos":
            raise ValueError(
                "data.padding is predicted_eos, which fills each conversation up to model.seq_length, but data.packing "
                "puts several in a sequence, whose rest belongs to none of them; set data.padding to eos or pad (and "
                "end answers by preprocess_data --append-eod), or data.packing to false"
            )
        return self

    @model_validator(mode="after")
    def _phases_ascend(self) -> DataConfig:
        for place, (before, phase) in enumerate(pairwise(self.phases or ())):
            if phase.from_step <= before.from_step:
                raise ValueError(
                    f"data.phases[{place + 1}].from_step is {phase.from_step}, not above {before.from_step} of the "
                    "phase before it; give the phases in ascending order"
                )
        return self

    @property
    def mixtures(self) -> dict[str, tuple[SourceConfig, ...]]:
        """Sources of every phase by their keys, such as `data.phases[0].train`."""
        later = {f"data.phases[{number}].train": phase.train for number, phase in enumerate(self.phases or ())}
        return {"data.train": self.train} | later

    @property
    def training_sources(self) -> dict[str, SourceConfig]:
        """Training sources of all phases by their keys, such as `data.phases[0].train[1]`."""
        return {
            f"{section}[{place}]": source
            for section, entries in self.mixtures.items()
            for place, source in enumerate(entries)
        }


class RampupConfig(Section):
    """A rampup of the batch size, as in `batch.rampup: {start: 64, increment: 64, every_steps: 500}`.

    The size of every stage must be a multiple of micro_batch_size x data-parallel ranks.
    """

    start: int = Field(gt=0)
    """Number of sequences in the first steps, at most global_batch_size."""

    increment: int = Field(gt=0)
    """Number of sequences added in each stage, up to global_batch_size."""

    every_steps: int = Field(gt=0)
    """Number of steps in a stage."""


class BatchConfig(Section):
    """The number of sequences in a step, and in a microbatch."""

    global_batch_size: int = Field(gt=0)
    """Number of sequences in a step over all ranks; a multiple of micro_batch_size x data-parallel ranks."""

    rampup: RampupConfig | None = None
    """Growth of the global batch to global_batch_size; unset for a constant size."""

    micro_batch_size: int = Field(gt=0)
    """Number of sequences per rank in one forward-backward pass."""

    @model_validator(mode="after")
    def _rampup_rises(self) -> BatchConfig:
        if self.rampup is not None and self.rampup.start > self.global_batch_size:
            raise ValueError(
                f"batch.rampup.start is {self.rampup.start}, above batch.global_batch_size = "
                f"{self.global_batch_size}, where the rampup ends; lower it, or leave the rampup out"
            )
        return self
