"""The validation ELBO: fixed sequences, fixed stratified noise, a standard error, identical on every layout.

Axes: R sequences, K noise levels per sequence.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadiff.data.sequences import joined_documents, joined_masks
from megadiff.diffusion.noising import NoisedBatch
from megadiff.errors import ConfigError
from megadiff.loss.lm_head import LossOutput
from megadiff.parallel.objective import DeviceBatch, Objective, ShardedObjective
from megadiff.parallel.pipeline import ModelChunk, run_microbatches
from megadiff.parallel.step_metrics import BIN_EDGES
from megadiff.parallel.topology import Topology
from megadiff.scaling.paired import EvaluationNoise, PerSequence

SEED = 0
"""Seed of the evaluation noise, independent of the run's seed, so that runs are compared on the same noise."""

_FINGERPRINT_DIGITS = 32
"""Number of hexadecimal digits of a fingerprint of sequences, 128 bits."""


@dataclass(frozen=True)
class ValidationResult:
    """A bound on validation data in nats per token, with its standard error over sequences."""

    elbo: float
    stderr: float
    tokens: int
    """Number of distinct validation tokens; of conversations, of those that are predicted."""
    bytes_per_token: float | None
    """Number of UTF-8 bytes of source text per token of the validation data; None if unknown."""
    by_log_snr: tuple[tuple[float, float, float], ...]
    """Loss by noise level: (low, high, mean of w (KL + IS) in nats) of each log-SNR bin with draws."""
    by_source: dict[str, tuple[float, float]]
    """Bound and standard error of each source of the validation data."""
    log_snr_range: tuple[float, float] | None
    """Range of log-SNR that the bound covers (`diffusion_bound`); None for an exact likelihood."""
    per_sequence: PerSequence = field(repr=False)
    """The bound of every sequence, for comparisons of runs."""

    @property
    def bits_per_byte(self) -> float | None:
        """The bound in bits per byte of text."""
        return self.elbo / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    def as_metrics(self) -> dict[str, Any]:
        """Return the entries of an evaluation line in `metrics.jsonl`."""
        return {
            "eval_elbo": self.elbo,
            "eval_elbo_stderr": self.stderr if math.isfinite(self.stderr) else None,
            "eval_bits_per_byte": self.bits_per_byte,
            "eval_tokens": self.tokens,
            "eval_log_snr_range": None if self.log_snr_range is None else list(self.log_snr_range),
            "eval_loss_by_log_snr": [list(part) for part in self.by_log_snr],
            "eval_elbo_by_source": {name: list(found) for name, found in self.by_source.items()},
        }

    def describe(self) -> str:
        """Return one line for the console."""
        bits = f" ({self.bits_per_byte:.3f} bits per byte)" if self.bits_per_byte else ""
        levels = "" if self.log_snr_range is None else " over log-SNR {:g} to {:g}".format(*self.log_snr_range)
        return (
            f"held-out elbo {self.elbo:.4f} +- {self.stderr:.4f} nats per token{bits}, {self.tokens:,} tokens{levels}"
        )


class Sequences(Protocol):
    """Validation sequences of one source."""

    name: str
    seq_length: int
    bytes_per_token: float | None

    def __len__(self) -> int: ...

    def sequences(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return clean sequences [B, L]."""
        ...

    def predicted(self, indices: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        """Return which of their tokens are to be predicted, [B, L]; None for all."""
        ...

    def documents(self, indices: Sequence[int]) -> npt.NDArray[np.int64] | None:
        """Return the documents of their tokens, [B, L]; None if every sequence is one document."""
        ...


@dataclass(frozen=True)
class EvalTask:
    """A quantity to evaluate: the sequences that the model reads, and the terms computed from its output."""

    objective: Objective
    batch: Callable[..., NoisedBatch]
    """Function of (clean [B, L], sequence indices [B], level) that returns the sequences. On data of conversations it
    is also given which tokens are to be predicted, [B, L]; the others are noise-free and do not count. Where sequences
    hold several conversations it is then given each token's document, [B, L] (`Method.batch`)."""
    num_noise_levels: int
    """K: number of noise levels; 1 if there is no noise."""
    log_snr_range: tuple[float, float] | None = None
    """Range of log-SNR that a bound covers; None for an exact likelihood."""


class ValidationEvaluator:
    """Evaluator of a model on sequences fixed at construction.

    Args:
        sources: validation sequences; they are pooled, and also reported separately.
        task: the quantity to evaluate.
        chunks: this rank's model chunks.
    """

    def __init__(
        self,
        *,
        sources: Sequence[Sequences],
        task: EvalTask,
        chunks: Sequence[ModelChunk],
        topology: Topology,
        device: torch.device,
        micro_batch_size: int,
    ) -> None:
        self.sequences = np.concatenate([source.sequences(range(len(source))) for source in sources])
        length, counts = self.sequences.shape[1], [len(source) for source in sources]
        self._predicted = joined_masks([one.predicted(range(len(one))) for one in sources], length, counts)
        self._documents = joined_documents([one.documents(range(len(one))) for one in sources], length, counts)
        if self._predicted is not None:
            _refuse_text_only(task, knows_documents=self._documents is not None)
        self.task = task
        self._objective = ShardedObjective(task.objective, topology)
        self.chunks = chunks
        self.topology = topology
        self.device = device
        self.micro_batch_size = micro_batch_size
        self.sources = sources

    def __call__(self) -> ValidationResult:
        """Run the model over every sequence at every level. Collective over the world; gradients are not touched."""
        found = torch.zeros(3, self.task.num_noise_levels, len(self.sequences), dtype=torch.float64, device=self.device)
        with torch.no_grad(), _evaluating(self.chunks):
            reports = run_microbatches(
                self.chunks,
                self._my_microbatches(),
                forward=lambda chunk, item: self._objective.forward(chunk, item[1]),
                loss=self._report,
                seq_length=self.sequences.shape[1],
                micro_batch_size=self.micro_batch_size,
                forward_only=True,
            )
        for (level, index), sums in reports:
            real = index >= 0
            found[:, level, index[real]] = sums[:, real]
        counts = np.full(len(self.sequences), self.sequences.shape[1], dtype=np.float64)
        if self._predicted is not None:
            counts = self._predicted.sum(axis=1, dtype=np.float64)
        elbo, loss, log_snr = self.topology.sum_over_run(found).cpu().numpy() / counts
        share = counts / counts.mean()
        per_sequence = elbo.mean(axis=0) * share
        bound, stderr = _mean_and_error(per_sequence, share)
        ends = np.cumsum([len(source) for source in self.sources])[:-1]
        return ValidationResult(
            per_sequence=PerSequence(self._fingerprint, self._noise, tuple(per_sequence.tolist())),
            elbo=bound,
            stderr=stderr,
            tokens=int(counts.sum()),
            log_snr_range=self.task.log_snr_range,
            bytes_per_token=self._bytes_per_token(),
            by_log_snr=_by_log_snr(loss, log_snr, share) if self.task.num_noise_levels > 1 else (),
            by_source={
                source.name: _mean_and_error(part, shares)
                for source, part, shares in zip(
                    self.sources, np.split(per_sequence, ends), np.split(share, ends), strict=True
                )
            },
        )

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.sequences.shape).encode())
        digest.update(self.sequences.astype("<u4").tobytes())
        if self._predicted is not None:
            digest.update(self._predicted.tobytes())
        return digest.hexdigest()[:_FINGERPRINT_DIGITS]

    @property
    def _noise(self) -> EvaluationNoise | None:
        ends = self.task.log_snr_range
        return None if ends is None else EvaluationNoise(SEED, self.task.num_noise_levels, ends)

    def _bytes_per_token(self) -> float | None:
        known = [(source.bytes_per_token, len(source)) for source in self.sources]
        if any(ratio is None for ratio, _ in known):
            return None
        return sum(ratio * count for ratio, count in known if ratio is not None) / len(self.sequences)

    def _my_microbatches(self) -> list[tuple[tuple[int, Tensor], DeviceBatch]]:
        """Return this replica's microbatches: a level and a few sequences each; sequence index -1 pads the last
        ones."""
        micro, layout = self.micro_batch_size, self.topology.layout
        starts = [
            (level, first)
            for level in range(self.task.num_noise_levels)
            for first in range(0, len(self.sequences), micro)
        ]
        share = -(-len(starts) // layout.data)
        if layout.virtual_pipeline > 1:  # the interleaved schedule needs a multiple of the stages
            share = -(-share // layout.pipeline) * layout.pipeline
        starts += [(0, len(self.sequences))] * (share * layout.data - len(starts))
        mine = starts[self.topology.data_rank * share : (self.topology.data_rank + 1) * share]
        return [self._microbatch(level, first) for level, first in mine]

    def _microbatch(self, level: int, first: int) -> tuple[tuple[int, Tensor], DeviceBatch]:
        index = np.arange(first, first + self.micro_batch_size)
        index = np.where(index < len(self.sequences), index, -1)
        taken = np.maximum(index, 0)
        more = [facts[taken] for facts in (self._predicted, self._documents) if facts is not None]
        placed = self._objective.place(self.task.batch(self.sequences[taken], taken, level, *more), self.device)
        return (level, torch.from_numpy(index).to(self.device)), placed

    def _report(self, output: LossOutput, item: tuple[tuple[int, Tensor], DeviceBatch]) -> tuple[Tensor, Tensor, Any]:
        key, (sequences, *_) = item
        terms = output.terms
        plain = terms.weight * (terms.kl + terms.itakura_saito)
        log_snr = (sequences.log_snr * sequences.is_noisy).t()
        sums = torch.stack([value.double().sum(0) for value in (terms.elbo, plain, log_snr)])
        nothing = torch.zeros((), device=self.device)
        return nothing, nothing.int(), (key, sums)


@contextmanager
def _evaluating(chunks: Sequence[ModelChunk]) -> Iterator[None]:
    """Switch modules to evaluation mode inside the block; those that train in FP8 then compute in bf16."""
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)


def _refuse_text_only(task: EvalTask, *, knows_documents: bool) -> None:
    """Refuse to measure a task of a user's own method on conversations if its sequences know only text.

    Args:
        task: the task.
        knows_documents: whether sequences hold several conversations.
    """
    try:
        signature(task.batch).bind(*range(5 if knows_documents else 4))
    except TypeError:
        if knows_documents:
            raise ConfigError(
                "validation data hold several conversations in a sequence (data.packing), but `batch` of the method's "
                "validation takes no fifth argument, each token's document; add it, or set data.packing to false"
            ) from None
        raise ConfigError(
            "validation data hold conversations, but `batch` of the method's validation takes no fourth argument, the "
            "tokens to predict; add it, or validate on text"
        ) from None


def _by_log_snr(
    loss: npt.NDArray[np.float64], log_snr: npt.NDArray[np.float64], share: npt.NDArray[np.float64]
) -> tuple[tuple[float, float, float], ...]:
    """Bin the per-sequence integrand by the log-SNR it was drawn at; both [K, R], with each sequence's share [R]."""
    which = np.clip(np.searchsorted(BIN_EDGES, log_snr, side="right") - 1, 0, len(BIN_EDGES) - 2)
    shares = np.broadcast_to(share, loss.shape)
    return tuple(
        (low, high, float((loss * shares)[which == index].sum() / shares[which == index].sum()))
        for index, (low, high) in enumerate(itertools.pairwise(BIN_EDGES))
        if (which == index).any()
    )


def _mean_and_error(values: npt.NDArray[np.float64], share: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean over tokens and its standard error over sequences.

    The mean is a ratio of two sums over sequences, of nats and of tokens; its error is that of its linear part.

    Args:
        values: mean over tokens of each sequence times its share, [R].
        share: number of tokens of each sequence in units of the mean number, 1 where all have as many, [R].
    """
    values, share = values / share.mean(), share / share.mean()
    mean = float(values.mean())
    error = float((values - mean * (share - 1.0)).std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean, error
