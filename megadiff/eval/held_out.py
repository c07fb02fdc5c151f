"""The validation ELBO: fixed rows, fixed stratified noise, a standard error, identical on every layout.

Axes: R rows, K noise levels per row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadiff.diffusion.next_token import next_token_rows
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.noising import NoisedRows, evaluation_noise
from megadiff.diffusion.schedules import LINEAR, LinearSchedule
from megadiff.kernels.choice import Head
from megadiff.kernels.fused_head import fused_objective
from megadiff.kernels.head import HeadLoss
from megadiff.model.attention import prompt_code
from megadiff.parallel.pipeline import ModelChunk, run_microbatches
from megadiff.parallel.row_objective import DiffusionObjective, NextTokenObjective, PlacedRows, RowObjective
from megadiff.parallel.row_report import BIN_EDGES
from megadiff.parallel.topology import Topology

SEED = 0
"""Seed of the evaluation noise, independent of the run's seed, so that runs are compared on the same noise."""


@dataclass(frozen=True)
class HeldOutResult:
    """A bound on validation data in nats per token, with its standard error over rows."""

    elbo: float
    stderr: float
    tokens: int
    """Number of distinct validation tokens."""
    bytes_per_token: float | None
    """Number of UTF-8 bytes of source text per token of the validation data; None if unknown."""
    by_log_snr: tuple[tuple[float, float, float], ...]
    """Loss by noise level: (low, high, mean of w (KL + IS) in nats) of each log-SNR bin with draws."""
    by_source: dict[str, tuple[float, float]]
    """Bound and standard error of each source of the validation data."""
    log_snr_range: tuple[float, float] | None
    """Range of log-SNR that the bound covers (`diffusion_bound`); None for an exact likelihood."""

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


class Rows(Protocol):
    """Validation rows of one source."""

    name: str
    seq_length: int
    bytes_per_token: float | None

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return clean rows [B, L]."""
        ...


@dataclass(frozen=True)
class Measure:
    """A quantity to evaluate: the rows that the model reads, and the terms computed from its output."""

    objective: RowObjective
    rows: Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64], int], NoisedRows]
    """Function of (clean [B, L], row indices [B], level) that returns the rows."""
    noise_levels: int
    """K: number of noise levels; 1 if there is no noise."""
    is_causal_prompt: bool = False
    log_snr_range: tuple[float, float] | None = None
    """Range of log-SNR that a bound covers; None for an exact likelihood."""


def diffusion_bound(
    process: NoiseProcess, *, topology: Topology, noise_levels: int, head: Head = fused_objective
) -> Measure:
    """Return the bound under the run's noise with the linear schedule, whatever schedule the run trains with.

    So it does not depend on the training schedule. Its p(log_snr) is the reference's, not renormalised for the
    truncation (`NoiseSchedule.density`): the figure is 1.000247 times the integral over [-9, 9]. A run that draws its
    levels from less than [-9, 9] (`gidd_time` does) is measured on all of it, so that runs compare.
    """
    trained = process.schedule
    linear = LinearSchedule(min(trained.min_log_snr, LINEAR.min_log_snr), max(trained.max_log_snr, LINEAR.max_log_snr))
    measured = process.with_schedule(linear)

    def rows(clean: npt.NDArray[np.int64], index: npt.NDArray[np.int64], level: int) -> NoisedRows:
        return evaluation_noise(
            clean, seed=SEED, row_index=index, level=level, num_levels=noise_levels, process=measured
        )

    objective = DiffusionObjective(measured, topology, head=head)
    levels = linear.min_log_snr, linear.max_log_snr
    return Measure(objective, rows, noise_levels, log_snr_range=levels)


def next_token_likelihood(
    process: NoiseProcess, *, start_id: int, topology: Topology, head: Head = fused_objective
) -> Measure:
    """Return the exact likelihood of an autoregressive model, on the same tokens and under the same keys as a bound."""

    def rows(clean: npt.NDArray[np.int64], index: npt.NDArray[np.int64], level: int) -> NoisedRows:
        return next_token_rows(clean, start_id=start_id)

    return Measure(NextTokenObjective(process, topology, head), rows, noise_levels=1, is_causal_prompt=True)


class HeldOut:
    """Evaluator of a model on rows fixed at construction.

    Args:
        sources: validation rows; they are pooled, and also reported separately.
        measure: the quantity to evaluate.
        chunks: this rank's model chunks.
    """

    def __init__(
        self,
        *,
        sources: Sequence[Rows],
        measure: Measure,
        chunks: Sequence[ModelChunk],
        topology: Topology,
        device: torch.device,
        micro_sequences: int,
    ) -> None:
        self.rows = np.concatenate([source.rows(range(len(source))) for source in sources])
        self.measure = measure
        self.chunks = chunks
        self.topology = topology
        self.device = device
        self.micro_sequences = micro_sequences
        self._sources = sources

    def __call__(self) -> HeldOutResult:
        """Run the model over every row at every level. Collective over the world; gradients are not touched."""
        found = torch.zeros(3, self.measure.noise_levels, len(self.rows), dtype=torch.float64, device=self.device)
        with torch.no_grad(), _evaluating(self.chunks):
            reports = run_microbatches(
                self.chunks,
                self._my_microbatches(),
                forward=self._forward,
                loss=self._report,
                seq_length=self.rows.shape[1],
                micro_sequences=self.micro_sequences,
                forward_only=True,
            )
        for (level, index), sums in reports:
            real = index >= 0
            found[:, level, index[real]] = sums[:, real]
        elbo, loss, log_snr = self.topology.sum_over_run(found).cpu().numpy() / self.rows.shape[1]
        per_row = elbo.mean(axis=0)
        bound, stderr = _mean_and_error(per_row)
        ends = np.cumsum([len(source) for source in self._sources])[:-1]
        return HeldOutResult(
            elbo=bound,
            stderr=stderr,
            tokens=self.rows.size,
            log_snr_range=self.measure.log_snr_range,
            bytes_per_token=self._bytes_per_token(),
            by_log_snr=_by_log_snr(loss, log_snr) if self.measure.noise_levels > 1 else (),
            by_source={
                source.name: _mean_and_error(part)
                for source, part in zip(self._sources, np.split(per_row, ends), strict=True)
            },
        )

    def _bytes_per_token(self) -> float | None:
        known = [(source.bytes_per_token, len(source)) for source in self._sources]
        if any(ratio is None for ratio, _ in known):
            return None
        return sum(ratio * count for ratio, count in known if ratio is not None) / len(self.rows)

    def _my_microbatches(self) -> list[tuple[tuple[int, Tensor], PlacedRows]]:
        """Return this replica's microbatches: a level and a few rows each; row index -1 pads the last ones."""
        micro, layout = self.micro_sequences, self.topology.layout
        starts = [
            (level, first) for level in range(self.measure.noise_levels) for first in range(0, len(self.rows), micro)
        ]
        share = -(-len(starts) // layout.data)
        if layout.virtual_pipeline > 1:  # the interleaved schedule needs a multiple of the stages
            share = -(-share // layout.pipeline) * layout.pipeline
        starts += [(0, len(self.rows))] * (share * layout.data - len(starts))
        mine = starts[self.topology.data_rank * share : (self.topology.data_rank + 1) * share]
        return [self._microbatch(level, first) for level, first in mine]

    def _microbatch(self, level: int, first: int) -> tuple[tuple[int, Tensor], PlacedRows]:
        index = np.arange(first, first + self.micro_sequences)
        index = np.where(index < len(self.rows), index, -1)
        taken = np.maximum(index, 0)
        placed = self.measure.objective.place(self.measure.rows(self.rows[taken], taken, level), self.device)
        return (level, torch.from_numpy(index).to(self.device)), placed

    def _forward(self, chunk: ModelChunk, item: tuple[Any, PlacedRows]) -> Any:
        placed = item[1]
        return chunk(
            placed.rows.noised,
            prompt_code(placed.rows.prompt_length, is_causal=self.measure.is_causal_prompt),
            loss_fn=lambda hidden, weight: self.measure.objective.lm_head_loss(hidden, weight, placed),
        )

    def _report(self, answer: HeadLoss, item: tuple[tuple[int, Tensor], PlacedRows]) -> tuple[Tensor, Tensor, Any]:
        key, (rows, _) = item
        terms = answer.terms
        plain = terms.weight * (terms.kl + terms.itakura_saito)
        sums = torch.stack([value.double().sum(0) for value in (terms.elbo, plain, rows.log_snr.t())])
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


def _by_log_snr(
    loss: npt.NDArray[np.float64], log_snr: npt.NDArray[np.float64]
) -> tuple[tuple[float, float, float], ...]:
    """Bin the per-row integrand by the log-SNR it was drawn at; both [K, R]."""
    which = np.clip(np.searchsorted(BIN_EDGES, log_snr, side="right") - 1, 0, len(BIN_EDGES) - 2)
    return tuple(
        (low, high, float(loss[which == index].mean()))
        for index, (low, high) in enumerate(itertools.pairwise(BIN_EDGES))
        if (which == index).any()
    )


def _mean_and_error(per_row: npt.NDArray[np.float64]) -> tuple[float, float]:
    error = float(per_row.std(ddof=1)) / math.sqrt(len(per_row)) if len(per_row) > 1 else math.nan
    return float(per_row.mean()), error
