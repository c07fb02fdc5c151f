"""Likelihoods of texts given prompts, each with its standard error: bounds for diffusion, exact for autoregression.

Only a completion's tokens are noised; its prompt stays clean. A result is a function of (seed, the item's own tokens),
and does not depend on the batch, the order, or the other items.

`bounds` and `exact` compute likelihoods from any model's answers; an `Estimator`, one for each kind of training method,
applies them to an opened model.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from megadiff.diffusion.next_token import next_token_batch
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.schedules import LINEAR
from megadiff.eval.effective_count import Copies, copies_by_count, copies_by_level, copy_bounds
from megadiff.sampling.sampler import Sampler
from megadiff.sampling.standalone import CounterRNG
from megadiff.scaling.paired import student_t_widening

if TYPE_CHECKING:
    from megadiff.data.tokenizers import Tokenizer

T = TypeVar("T")

Answer = Callable[[Tensor, Tensor], Tensor]
"""A model: (ids [B, L] int64, prompt lengths [B] int64 on the CPU) -> logits [B, L, V or more]."""

Progress = Callable[[int], None]
"""Callback with the number of sequences that the model has just read; `sequences_read` gives their total."""


@dataclass(frozen=True)
class Item:
    """A completion given a prompt, both as token ids; the prompt may be empty."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def key(self) -> int:
        """A number in [0, 2^63) computed from the tokens, which keys the item's noise."""
        text = f"{','.join(map(str, self.prompt))}|{','.join(map(str, self.completion))}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return self.prompt + self.completion


def seed_of(seed: int, item: Item) -> int:
    """Return a number unique to this pair."""
    return (seed << 63) + item.key


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of a completion in nats."""

    nll: float
    """Exact value, or for a diffusion model an upper bound (its log-likelihood is at least -nll)."""
    stderr: float
    """Standard error of the estimate of the bound, in nats: +- 1.96 of it is a 95 % interval (see `mean_and_error`). It
    is 0 if the likelihood is exact.
    """
    tokens: int
    """Number of completion tokens."""
    degrees: float = math.inf
    """Degrees of freedom of the estimated error."""


@dataclass(frozen=True)
class BoundSettings:
    """Settings of the estimator of a bound.

    Raises:
        ValueError: an odd number of draws, or fewer than 4.
    """

    draws: int = 128
    """Number of noised copies of each item, each a sequence for the model; even."""
    estimator: Literal["counts", "levels"] = "counts"
    """Kind of estimator. counts: by the number of noised tokens, over all noise levels (`effective_count`); levels: by
    stratified levels on [-9, 9], the integral over which omits the bound's part beyond.
    """
    seed: int = 0
    batch_size: int = 32
    context_length: int | None = None
    """Length to which sequences are filled with pure noise after the completion, as in the released code; None for
    none."""

    def __post_init__(self) -> None:
        if self.draws < 4 or self.draws % 2:
            raise ValueError(f"draws must be even and at least 4, got {self.draws}")

    @property
    def log_snr_range(self) -> tuple[float, float] | None:
        """Range of log-SNR that the estimate covers; None for all levels."""
        return None if self.estimator == "counts" else (LINEAR.min_log_snr, LINEAR.max_log_snr)


def summed(items: Iterable[Item], found: Mapping[Item, Likelihood]) -> Likelihood:
    """Return the likelihood of several items together.

    Distinct items have independent noise, so the squares of their errors add. Equal items share their noise: they are
    one estimate, and their errors add linearly.
    """
    parts = [(count, found[item]) for item, count in Counter(iter(items)).items()]  # iter: a mapping is counted too
    variances = [(count * one.stderr / student_t_widening(one.degrees)) ** 2 for count, one in parts]
    variance = math.fsum(variances)
    spread = math.fsum(part**2 / one.degrees for part, (_, one) in zip(variances, parts, strict=True))
    degrees = variance**2 / spread if spread > 0 else math.inf  # Satterthwaite's rule
    return Likelihood(
        nll=math.fsum(count * one.nll for count, one in parts),
        stderr=math.sqrt(variance) * student_t_widening(degrees),
        tokens=sum(count * one.tokens for count, one in parts),
        degrees=degrees,
    )


def sequences_read(items: Iterable[Item], *, draws: int = 1) -> int:
    """Return the number of sequences that a model reads to evaluate these items; equal ones are evaluated once."""
    return draws * sum(1 for item in dict.fromkeys(items) if item.completion)


def bounds(
    items: Sequence[Item],
    denoise: Answer,
    *,
    process: NoiseProcess,
    settings: BoundSettings | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Likelihood]:
    """Return the diffusion bound of every item, in order. Sequences of equal length share a batch.

    Equal items share their noise and hence their estimate; they are evaluated once, and `summed` adds them up.

    Raises:
        ValueError: an item longer than `context_length`.
    """
    asked, items = items, list(dict.fromkeys(items))
    settings = settings or BoundSettings()
    found = {item: Likelihood(0.0, 0.0, 0) for item in items}
    for sequences in _copy_batches(items, settings, process):
        logits = denoise(
            _sequence_ids(items, sequences, settings, process).to(device), _prompt_lengths(items, sequences)
        )
        for sequence, answer in zip(sequences, logits, strict=True):
            item = items[sequence.item]
            start, stop = len(item.prompt), len(item.ids)
            clean, noised = (
                torch.tensor(ids, device=answer.device) for ids in (item.completion, sequence.noised.tolist())
            )
            sequence.values[sequence.draw] = copy_bounds(
                answer[start:stop], clean, noised, sequence.log_snr, process=process
            )
            if sequence.draw == settings.draws - 1:
                mean, error, degrees = mean_and_error(sequence.values)
                found[item] = Likelihood(mean * sequence.factor, error * sequence.factor, len(item.completion), degrees)
        if progress is not None:
            progress(len(sequences))
    return [found[item] for item in asked]


def exact(
    items: Sequence[Item],
    next_token: Answer,
    *,
    start_id: int,
    mask_id: int,
    vocab_size: int,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Likelihood]:
    """Return the likelihood of every item under an autoregressive model, in order; equal ones are evaluated once.

    Args:
        items: completions given prompts.
        next_token: the model; causal, so sequences are padded after their text to share a batch.
        start_id: token before the first one (see `diffusion.next_token`).
        mask_id, vocab_size: the mask and padding are not tokens, so the softmax excludes them.
        batch_size: maximal number of sequences per batch.
        device: device of the model.
        progress: called after each batch.
    """
    asked, items = items, list(dict.fromkeys(items))
    found = {item: Likelihood(0.0, 0.0, 0) for item in items}
    order = sorted((i for i, item in enumerate(items) if item.completion), key=lambda i: (len(items[i].ids), i))
    for first in range(0, len(order), batch_size):
        taken = order[first : first + batch_size]
        length = len(items[taken[-1]].ids)
        clean = np.array([items[i].ids + (start_id,) * (length - len(items[i].ids)) for i in taken], dtype=np.int64)
        shifted = next_token_batch(clean, start_id=start_id)
        logits = next_token(shifted.noised.to(device), shifted.prompt_length)[..., :vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        logits[..., mask_id] = -torch.inf
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), shifted.clean.to(device), reduction="none")
        for i, sequence in zip(taken, nll.double(), strict=True):
            start, stop = len(items[i].prompt), len(items[i].ids)
            found[items[i]] = Likelihood(float(sequence[start:stop].sum()), 0.0, stop - start)
        if progress is not None:
            progress(len(taken))
    return [found[item] for item in asked]


def mean_and_error(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of values of neighbouring strata, one per stratum, its standard error, and degrees of freedom.

    With pairs (y_2j, y_2j+1) the variance of the mean is estimated as the sum of v_j / K^2, v_j = (y_2j - y_2j+1)^2
    (collapsed strata): on average never too small, since differences between two strata are counted as noise. Copies
    with few noised tokens vary most, so that a few pairs make most of the sum: its degrees of freedom are taken as
    3 (sum v)^2 / sum v^2 - 2 (Satterthwaite's rule for parts of one degree each, corrected for their own scatter;
    Johnson and Rust, 1992), and the error is widened by Student's t over the normal quantile, so that +- 1.96 of it
    is a 95 % interval.
    """
    pairs = values.reshape(-1, 2)
    parts = np.square(pairs[:, 0] - pairs[:, 1])
    total, squares = float(parts.sum()), float(np.square(parts).sum())
    degrees = max(1.0, 3.0 * total**2 / squares - 2.0) if squares > 0 else math.inf
    return float(values.mean()), math.sqrt(total) / len(values) * student_t_widening(degrees), degrees


@dataclass
class _NoisedCopy:
    """One noised copy of one item as a sequence of the model's input; the sequences of an item share `values`."""

    item: int
    draw: int
    noised: np.ndarray
    log_snr: float | None
    factor: float
    values: np.ndarray


def _copy_batches(items: Sequence[Item], settings: BoundSettings, process: NoiseProcess) -> Iterator[list[_NoisedCopy]]:
    """Yield sequences of one length, at most `batch_size` of them at a time."""
    longest = max((len(item.ids) for item in items), default=0)
    if settings.context_length is not None and longest > settings.context_length:
        raise ValueError(f"an item has {longest} tokens, more than the context of {settings.context_length}")
    order = sorted((i for i, item in enumerate(items) if item.completion), key=lambda i: (len(items[i].ids), i))
    waiting: list[_NoisedCopy] = []
    for index in order:
        length = len(items[index].ids)
        if waiting and settings.context_length is None and len(items[waiting[0].item].ids) != length:
            yield waiting
            waiting = []
        copies, values = _copies(items[index], settings, process), np.zeros(settings.draws)
        for draw, noised in enumerate(copies.noised):
            level = None if copies.log_snr is None else float(copies.log_snr[draw])
            waiting.append(_NoisedCopy(index, draw, noised, level, copies.factor, values))
            if len(waiting) == settings.batch_size:
                yield waiting
                waiting = []
    if waiting:
        yield waiting


def _copies(item: Item, settings: BoundSettings, process: NoiseProcess) -> Copies:
    draw = copies_by_count if settings.estimator == "counts" else copies_by_level
    clean = np.array(item.completion, dtype=np.int64)
    return draw(clean, settings.draws, process=process, seed=settings.seed, key=item.key)


def _sequence_ids(
    items: Sequence[Item], sequences: Sequence[_NoisedCopy], settings: BoundSettings, process: NoiseProcess
) -> Tensor:
    """Return the ids that the model reads, [B, L]: clean prompt, noised completion and, if asked for, pure noise up to
    the context."""
    own = [[*items[sequence.item].prompt, *sequence.noised.tolist()] for sequence in sequences]
    if settings.context_length is None:
        return torch.tensor(own)
    keys = torch.tensor([items[sequence.item].key for sequence in sequences])
    tail = CounterRNG(settings.seed, keys, "cpu").noise(settings.context_length, -9.0, process, name="likelihood/tail")
    for place, ids in enumerate(own):
        tail[place, : len(ids)] = torch.tensor(ids)
    return tail


def _prompt_lengths(items: Sequence[Item], sequences: Sequence[_NoisedCopy]) -> Tensor:
    return torch.tensor([len(items[sequence.item].prompt) for sequence in sequences], dtype=torch.int64)


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
