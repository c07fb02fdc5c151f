"""The sections `data:` and `batch:` of the configuration, and the number of sequences in each step.

With a rampup the global batch grows in stages: `start` sequences for the first `every_steps` steps, `increment` more in
each further stage, up to `global_batch_size`. The samples of a step are a closed-form function of the step alone, so a
resumed run, a planner and the noise need no history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from megadiff.config.section import Section
from megadiff.errors import ConfigError


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


class StepBatch(NamedTuple):
    """A step's global batch: the samples first_sample .. first_sample + sequences - 1."""

    step: int
    """Number of steps taken before it."""

    first_sample: int

    sequences: int
    """Number of sequences over all ranks."""


@dataclass(frozen=True)
class BatchSizes:
    """Number of sequences in every step of a run; steps and samples count from 0.

    Args:
        global_batch_size: number in every step, or after the rampup.
        rampup: its start is at most `global_batch_size`, which `BatchConfig` checks.
    """

    global_batch_size: int
    rampup: RampupConfig | None = None

    @cached_property
    def num_stages(self) -> int:
        """K: number of stages of the rampup before the final size is reached; 0 without a rampup."""
        if self.rampup is None:
            return 0
        return -((self.rampup.start - self.global_batch_size) // self.rampup.increment)

    @property
    def end_of_rampup(self) -> int:
        """The first step with `global_batch_size` sequences."""
        return 0 if self.rampup is None else self.num_stages * self.rampup.every_steps

    @property
    def distinct(self) -> list[int]:
        """All sizes that occur, ascending."""
        return [self._size(stage) for stage in range(self.num_stages + 1)]

    def sequences(self, step: int) -> int:
        """Return the number of sequences in a step."""
        return self._size(
            self.num_stages if self.rampup is None else min(step // self.rampup.every_steps, self.num_stages)
        )

    def samples_before(self, step: int) -> int:
        """Return the number of samples before a step, which is the first sample of its batch.

        k stages of E steps each take E (k start + increment k (k - 1) / 2) samples.
        """
        if self.rampup is None:
            return step * self.global_batch_size
        stage = min(step // self.rampup.every_steps, self.num_stages)
        whole = stage * self.rampup.start + self.rampup.increment * (stage * (stage - 1) // 2)
        return self.rampup.every_steps * whole + (step - stage * self.rampup.every_steps) * self._size(stage)

    def batch_of(self, step: int) -> StepBatch:
        """Return the global batch of a step."""
        return StepBatch(step, self.samples_before(step), self.sequences(step))

    def step_of(self, sample: int) -> int:
        """Return the step that contains a sample."""
        if self.rampup is None:
            return sample // self.global_batch_size
        low, high = 0, self.num_stages  # binary search for the last stage that starts at or before the sample
        while low < high:
            middle = (low + high + 1) // 2
            if self.samples_before(middle * self.rampup.every_steps) <= sample:
                low = middle
            else:
                high = middle - 1
        first = low * self.rampup.every_steps
        return first + (sample - self.samples_before(first)) // self._size(low)

    def origin_of(self, sample: int) -> tuple[int, int]:
        """Return (first sample, sequences) of the global batch that contains a sample."""
        batch = self.batch_of(self.step_of(sample))
        return batch.first_sample, batch.sequences

    def steps_for_samples(self, samples: int) -> int:
        """Return the smallest number of steps with at least this number of samples."""
        return 0 if samples <= 0 else self.step_of(samples - 1) + 1

    def num_microbatches(self, step: int, *, micro_batch_size: int, dp_size: int) -> int:
        """Return the number of microbatches per data-parallel rank in a step; call `check` first."""
        return self.sequences(step) // (micro_batch_size * dp_size)

    def check(self, *, micro_batch_size: int, dp_size: int) -> None:
        """Refuse sizes that do not divide over the ranks.

        Raises:
            ConfigError: a size does not divide; the message names the first such size, and sizes that would.
        """
        together = micro_batch_size * dp_size
        for stage, size in enumerate(self.distinct):
            if size % together:
                below = size // together * together
                near = f"{below} or {below + together}" if below else f"{together}"
                raise ConfigError(
                    "every global batch must be a multiple of batch.micro_batch_size x data-parallel ranks = "
                    f"{micro_batch_size} x {dp_size}, found {self._name(stage)}; use {near}, or change "
                    "batch.micro_batch_size"
                )

    def _size(self, stage: int) -> int:
        if self.rampup is None:
            return self.global_batch_size
        return min(self.rampup.start + stage * self.rampup.increment, self.global_batch_size)

    def _name(self, stage: int) -> str:
        """Return the setting that determines a stage's size, with its value."""
        if self.rampup is None or stage == self.num_stages:
            return f"batch.global_batch_size = {self.global_batch_size}"
        if stage == 0:
            return f"batch.rampup.start = {self.rampup.start}"
        step = stage * self.rampup.every_steps
        return f"{self._size(stage)} from step {step} on (batch.rampup.increment = {self.rampup.increment})"
