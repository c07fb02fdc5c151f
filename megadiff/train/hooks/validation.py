"""Hooks that look at the model every few steps: the bound on held-out sequences, and text drawn from it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from megadiff.data.tokenizers import Tokenizer
from megadiff.files import write_atomically
from megadiff.parallel.attention_pattern import AttentionPattern
from megadiff.parallel.pipeline import DistributedForward, ModelChunk
from megadiff.parallel.topology import Topology
from megadiff.sampling.sampler import Sampler
from megadiff.sampling.trace import printable
from megadiff.scaling.paired import PerSequence
from megadiff.train.goodput import Goodput
from megadiff.train.hooks import Hook, MetricSinks, Part, StepInfo
from megadiff.train.hooks.metrics_file import PerSequenceFile

log = logging.getLogger("megadiff")

TEXT_SEED = 0
"""Seed of the samples, not the run's: the same noise at every step and in every run, so that only the model differs."""


@dataclass(kw_only=True)
class PeriodicHook(Hook, ABC):
    """A hook that runs before the first step, every `every` steps, at some more, and after the last.

    It is collective over the run.
    """

    section: ClassVar[Part] = "eval"
    collectives: ClassVar[bool] = True
    every: int
    """Number of steps between calls of `run`; 0 for no regular ones."""
    at_steps: frozenset[int] = frozenset()
    """Further steps after which `run` is called."""
    steps: int
    """Number of steps of the whole run."""
    first_step: int
    """Number of steps taken before this process began."""
    goodput: Goodput
    """Record of where the run's time goes."""

    @abstractmethod
    def run(self, step: int) -> None:
        """Do the hook's work on the model after `step` steps."""

    def open(self) -> None:
        """Run on the first weights, unless the run resumes."""
        if self.first_step == 0:
            self.run(0)

    def __call__(self, info: StepInfo) -> None:
        """Run if due."""
        is_regular = self.every > 0 and info.step % self.every == 0
        if is_regular or info.step in self.at_steps or info.step == self.steps:
            self.run(info.step)


class Measurement(Protocol):
    """The result of an evaluation."""

    @property
    def elbo(self) -> float:
        """The bound in nats per token."""
        ...

    @property
    def per_sequence(self) -> PerSequence:
        """The bound of every sequence."""
        ...

    def as_metrics(self) -> dict[str, Any]:
        """Return the keys and values of an evaluation line."""
        ...

    def describe(self) -> str:
        """Return the text for the console."""
        ...


@dataclass(kw_only=True)
class ValidationHook(PeriodicHook):
    """The held-out bound at the steps of a `PeriodicHook`."""

    evaluate: Callable[[], Measurement]
    """Function that measures the bound; collective over the run."""
    sinks: MetricSinks
    """Sinks of the lines; empty on ranks other than the main one."""
    per_sequence: PerSequenceFile | None = None
    """File that keeps the bound of every sequence; None on ranks other than the main one."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Keys and values that every evaluation line has beside the measurement's: figures to compare it with."""

    def run(self, step: int) -> None:
        """Measure, and write the line of this step."""
        with self.goodput.during("evaluate"):
            found = self.evaluate()
        if self.sinks:
            self.sinks.write({"step": step, **found.as_metrics(), **self.baselines}, step)
            if self.per_sequence is not None:
                self.per_sequence.add(step, found.per_sequence)
            log.info(f"step {step:>7}/{self.steps} | {found.describe()}")


@dataclass(kw_only=True)
class SampleHook(PeriodicHook):
    """A file of sampled text before the first step, every `every` steps (0: never between), and after the last."""

    sample: Callable[[], str]
    """Function that samples text; collective over the run."""
    folder: Path | None
    """The run folder; None on ranks other than the main one."""

    def run(self, step: int) -> None:
        """Write the file of this step; a disk that refuses costs the file and not the run."""
        with self.goodput.during("evaluate"):
            text = self.sample()
        if self.folder is None:
            return
        path = self.folder / "samples" / f"step_{step:08d}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, text.encode(errors="replace"), is_durable=False)
        except OSError as error:
            log.warning(f"step {step:>7}/{self.steps} | {path} was not written: {error.strerror or error}")


class DrawnText:
    """Whole sequences of new text by the ancestral sampler, temperature 1, without a prompt.

    Args:
        sampler: the sampler of the run's training method.
        attention: the attention after a clean prompt (`Method.prompted_attention`).
        start: tokens that each sequence begins with (bos, if the training data have it).
        sequences, steps: number of sequences, and number of denoising steps.
        chunks: this rank's model chunks.
    """

    def __init__(
        self,
        *,
        sequences: int,
        steps: int,
        seq_length: int,
        sampler: Sampler,
        attention: Callable[[Tensor, int], AttentionPattern],
        tokenizer: Tokenizer,
        start: Sequence[int] = (),
        chunks: Sequence[ModelChunk],
        topology: Topology,
        device: torch.device,
    ) -> None:
        self._sequences, self._sampler, self._tokenizer, self._device = sequences, sampler, tokenizer, device
        self._model = DistributedForward(
            chunks,
            topology=topology,
            device=device,
            shape=(sequences, seq_length),
            attention=attention,
            vocab_size=sampler.process.vocab_size,
        )
        self._start = list(start)
        self._settings = sampler.settings(seq_length - len(self._start), max_denoising_steps=steps)

    def __call__(self) -> str:
        """Draw the samples. Collective over the world; every rank returns the text, sequences numbered."""
        ids = self._model.run(self._drawn)
        texts = [printable(self._tokenizer.decode(sequence)) for sequence in ids.tolist()]
        return "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1)) + "\n"

    def _drawn(self, denoise: Any) -> Tensor:
        prompt = torch.tensor([self._start] * self._sequences, dtype=torch.int64, device=self._device)
        prompt = prompt.reshape(self._sequences, len(self._start))
        return self._sampler.generate(denoise, prompt, self._settings, seed=TEXT_SEED).sequences.cpu()
