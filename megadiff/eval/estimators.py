"""Estimators of the likelihood of texts under a trained model, one for each kind of training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from megadiff.diffusion.next_token import next_token_batch
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.eval.likelihood import BoundSettings, Item, Likelihood, Progress, bounds, exact, seed_of
from megadiff.sampling.sampler import Sampler

if TYPE_CHECKING:
    from megadiff.data.tokenizers import Tokenizer

T = TypeVar("T")


class Machine(Protocol):
    """The machine that a model runs on."""

    @property
    def device(self) -> torch.device:
        """The device of its ids and logits."""
        ...


class HasSeqLength(Protocol):
    """The part of a model's configuration that is needed here."""

    @property
    def seq_length(self) -> int:
        """Number of tokens in a sequence."""
        ...


class EvaluatedModel(Protocol):
    """A model that can be evaluated and perhaps sampled, such as `run.load_model.InferenceModel`."""

    @property
    def adds_start_token(self) -> bool:
        """Whether the model's method itself puts a token before every sequence."""
        ...

    @property
    def prepends_bos(self) -> bool:
        """Whether the documents of the training data began with bos."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        ...

    @property
    def model(self) -> HasSeqLength:
        """The model's configuration."""
        ...

    @property
    def platform(self) -> Machine:
        """The machine that the model runs on."""
        ...

    def estimator(self, settings: BoundSettings) -> Estimator:
        """Return the estimator of likelihoods; ConfigError if there is none."""
        ...

    def sampler(self) -> Sampler:
        """Return the sampler; ConfigError if there is none."""
        ...

    def logits(self, ids: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Map ids [B, L] and lengths [B] of clean prompts to logits [B, L, V]."""
        ...

    def denoise(self, ids: Tensor, prompt_length: int = 0) -> Tensor:
        """Map ids [B, L], whose first `prompt_length` tokens are clean, to logits [B, L, V]."""
        ...


@dataclass(frozen=True)
class Estimator(ABC):
    """An estimator of likelihoods and of greedy completions."""

    settings: BoundSettings
    process: NoiseProcess

    @property
    @abstractmethod
    def draws(self) -> int:
        """Number of sequences that the model reads for each text."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name of the figure: `exact`, `bound` or `part of the bound`."""

    @property
    @abstractmethod
    def coverage(self) -> str:
        """Words about the figure for people, such as `bound, all noise levels`."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Return the entries of a JSON report that define the figure."""

    @abstractmethod
    def likelihoods(
        self, model: EvaluatedModel, items: Sequence[Item], *, progress: Progress | None = None
    ) -> list[Likelihood]:
        """Return the likelihood of every item, in order."""

    @abstractmethod
    def are_greedy(self, model: EvaluatedModel, items: Sequence[Item], seed: int) -> list[bool]:
        """Return whether each completion is the model's greedy one; prompts have one length, completions another."""


@dataclass(frozen=True)
class BoundEstimator(Estimator):
    """The diffusion bound (`likelihood.bounds`)."""

    @property
    def draws(self) -> int:
        """Number of noised copies of each text."""
        return self.settings.draws

    @property
    def kind(self) -> str:
        """Name of the figure: `bound`, or `part of the bound` if the estimator leaves out noise levels."""
        return "bound" if self.settings.log_snr_range is None else "part of the bound"

    @property
    def coverage(self) -> str:
        """The noise levels that the figure covers."""
        levels = self.settings.log_snr_range
        if levels is None:
            return "bound, all noise levels"
        return "the bound's part over log-SNR {:g} to {:g}".format(*levels)

    def record(self) -> dict[str, Any]:
        """Return kind and range of the figure and the estimator's settings."""
        levels = self.settings.log_snr_range
        return {
            "kind": self.kind,
            "log_snr_range": "all" if levels is None else list(levels),
            "estimator": self.settings.estimator,
            "draws": self.settings.draws,
            "seed": self.settings.seed,
        }

    def likelihoods(
        self, model: EvaluatedModel, items: Sequence[Item], *, progress: Progress | None = None
    ) -> list[Likelihood]:
        """Return the bound of every item, with its standard error."""
        return bounds(
            items,
            model.logits,
            process=self.process,
            settings=self.settings,
            device=model.platform.device,
            progress=progress,
        )

    def are_greedy(self, model: EvaluatedModel, items: Sequence[Item], seed: int) -> list[bool]:
        """Return whether the adaptive sampler writes each completion at temperature 0, one token per step.

        It starts from as many positions of noise as the completion has tokens; that noise is keyed by (seed, the
        prompt), so at most one completion of each length is greedy.
        """
        length, sampler = len(items[0].completion), model.sampler()
        settings = sampler.settings(
            length, max_denoising_steps=length, sampler="adaptive", tokens_per_step=1, temperature=0.0
        )
        prompts = torch.tensor([item.prompt for item in items], dtype=torch.int64).reshape(len(items), -1)
        seeds = [seed_of(seed, Item(item.prompt, ())) for item in items]
        written = sampler.generate(model.denoise, prompts.to(model.platform.device), settings, seed=seeds).sequences
        return [tuple(sequence) == item.ids for sequence, item in zip(written.tolist(), items, strict=True)]


@dataclass(frozen=True)
class ExactEstimator(Estimator):
    """The likelihood of next-token prediction (`likelihood.exact`)."""

    start_id: int
    """Token before every sequence."""

    @property
    def draws(self) -> int:
        """Number of sequences for each text: one."""
        return 1

    @property
    def kind(self) -> str:
        """Name of the figure: `exact`."""
        return "exact"

    @property
    def coverage(self) -> str:
        """Words about the figure: `exact`."""
        return "exact"

    def record(self) -> dict[str, Any]:
        """Return the kind of the figure."""
        return {"kind": "exact"}

    def likelihoods(
        self, model: EvaluatedModel, items: Sequence[Item], *, progress: Progress | None = None
    ) -> list[Likelihood]:
        """Return the likelihood of every item."""
        return exact(
            items,
            model.logits,
            start_id=self.start_id,
            mask_id=self.process.mask_id,
            vocab_size=self.process.vocab_size,
            batch_size=self.settings.batch_size,
            device=model.platform.device,
            progress=progress,
        )

    def are_greedy(self, model: EvaluatedModel, items: Sequence[Item], seed: int) -> list[bool]:
        """Return whether every token of each completion is the most probable one after its predecessors."""
        del seed  # nothing is random
        clean = np.array([item.ids for item in items], dtype=np.int64)
        sequences = next_token_batch(clean, start_id=self.start_id)
        logits = model.logits(sequences.noised.to(model.platform.device), sequences.prompt_length)
        logits = logits[:, len(items[0].prompt) :, : self.process.vocab_size].float()
        logits[..., self.process.mask_id] = -torch.inf
        agrees = logits.argmax(dim=-1).cpu() == sequences.clean[:, len(items[0].prompt) :]
        return agrees.all(dim=1).tolist()


def greedy(
    model: EvaluatedModel,
    estimator: Estimator,
    items: Sequence[Item],
    *,
    progress: Callable[[int], None],
) -> list[bool]:
    """Return whether each completion is the greedy one (`Estimator.are_greedy`), in order; an empty one is."""
    settings = estimator.settings
    found = [not item.completion for item in items]
    open_items = (i for i, item in enumerate(items) if item.completion)
    for taken in batches(open_items, lambda i: (len(items[i].prompt), len(items[i].completion)), settings.batch_size):
        answers = estimator.are_greedy(model, [items[i] for i in taken], settings.seed)
        for i, answer in zip(taken, answers, strict=True):
            found[i] = answer
        progress(len(taken))
    return found


def batches(members: Iterable[T], key: Callable[[T], tuple[int, ...]], count: int) -> Iterator[list[T]]:
    """Yield members with equal keys together, at most `count` at a time, in the order of the keys."""
    waiting: list[T] = []
    for member in sorted(members, key=key):
        if waiting and (len(waiting) == count or key(waiting[0]) != key(member)):
            yield waiting
            waiting = []
        waiting.append(member)
    if waiting:
        yield waiting
