"""Replay of one training step in a single process: its batch, its noise, and the loss of every sequence. Read-only.

Sequences and noise are functions of the seed and the sample index alone, and a checkpoint loads on any layout; so a
step that ran on a thousand ranks can be examined on one CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadiff.checkpoint.folder import is_complete, step_folders, step_of
from megadiff.checkpoint.load import load, problem_of
from megadiff.checkpoint.manifest import read_manifest
from megadiff.config.load import load_config
from megadiff.data.loader import Microbatch
from megadiff.data.sequences import Origin
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.noising import NoisedBatch, joined_batches
from megadiff.diffusion.objective import Terms
from megadiff.errors import CheckpointError, ConfigError
from megadiff.loss.lm_head import LossOutput, VocabShard
from megadiff.methods import Method
from megadiff.metric_lines import read_metrics
from megadiff.parallel.attention_pattern import AttentionPattern
from megadiff.parallel.config import ParallelConfig
from megadiff.parallel.objective import DeviceBatch, Objective
from megadiff.parallel.step_metrics import metrics_of
from megadiff.parallel.topology import Topology, open_topology, process_group
from megadiff.platform.machine import Platform, detect
from megadiff.run.build import build_loss, build_trainables, sequence_loader, training_step
from megadiff.run.config import RunConfig
from megadiff.run.context import RunContext, validate_run
from megadiff.run.step_sequences import trained_with, with_data_of_step
from megadiff.train.health import Health, StepDecision
from megadiff.train.loop import StepOutput, TrainStep

log = logging.getLogger("megadiff")


_COMPARED = ("loss", "elbo", "grad_norm")
"""Figures that are compared with those of the run's own line."""


@dataclass(frozen=True)
class ReplayedSequence:
    """One sequence of the step's batch."""

    sample: int
    """Global sample index."""
    origin: Origin
    log_snr: tuple[float, float]
    """Lowest and highest over the noisy tokens; NaN where there are none."""
    noisy_tokens: int
    loss: float
    """Mean per noisy token, nats; 0 where there are none."""
    elbo: float

    @property
    def is_finite(self) -> bool:
        """Whether both figures are."""
        return math.isfinite(self.loss) and math.isfinite(self.elbo)


@dataclass(frozen=True)
class Replayed:
    """A step taken again."""

    step: int
    start: str
    """Source of the weights."""
    steps_between: int
    """Steps taken in memory before it."""
    sequences: list[ReplayedSequence]
    batch: NoisedBatch
    """All sequences of the step in the order of their samples, on the CPU."""
    loss_of_tokens: Tensor
    """[B, L] float32, nats; 0 at noise-free positions."""
    elbo_of_tokens: Tensor
    figures: dict[str, float]
    """`loss`, `elbo` and `grad_norm` of the whole batch."""
    logged: dict[str, Any] | None
    """The run's own line of this step in `metrics.jsonl`, if it has one."""
    skip: str | None
    """Reason why the run makes no update in this step; None if it does."""
    broken_sequence: int | None
    """Sample of the first sequence whose loss, or else whose gradient, is not finite."""

    def differences(self) -> dict[str, float | None]:
        """Return relative differences from the logged figures; None where either is missing or not finite."""
        found: dict[str, float | None] = {}
        for key in _COMPARED:
            here, there = self.figures[key], (self.logged or {}).get(key)
            if there is None or not math.isfinite(here):
                found[key] = None
            else:
                found[key] = abs(here - there) / max(abs(there), 1e-30)
        return found

    def save(self, path: Path) -> None:
        """Write the batch and its per-token figures as a compressed `.npz`."""
        arrays: dict[str, Any] = {name: value.numpy() for name, value in self.batch.columns().items()}
        arrays |= {"loss": self.loss_of_tokens.numpy(), "elbo": self.elbo_of_tokens.numpy()}
        with path.open("wb") as file:
            np.savez_compressed(file, samples=np.array([sequence.sample for sequence in self.sequences]), **arrays)


def replay(run_folder: Path, step: int, overrides: Sequence[str] = ()) -> Replayed:
    """Replay step `step` (from 1) of a run in one CPU process.

    It starts from the newest sound checkpoint before the step, or from the initial weights, and repeats the steps
    between with the settings of the run's `config.yaml`; settings of another attempt can be given as overrides.

    Args:
        overrides: `key.sub=value`, for data or a tokenizer that have moved. The layout is always a single process.

    Raises:
        ConfigError: there is no such run or no such step.
        DataError: data or tokenizer are missing or damaged.
        CheckpointError: the data or the tokenizer are not those the run was trained with.
    """
    config = _settings(run_folder, overrides)
    if not 1 <= step <= config.steps:
        raise ConfigError(f"--step {step}: the run {run_folder} has the steps 1 to {config.steps}; give one of them")
    platform = detect("cpu")
    prepared = validate_run(config, world_size=1)
    platform.prepare_megatron()
    with process_group(platform, alone=True):
        return _open(run_folder, step, prepared, platform).take(step)


def _settings(run_folder: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the run's own configuration, laid out for one process."""
    path = run_folder / "config.yaml"
    if not path.is_file():
        what = "it has no config.yaml" if run_folder.is_dir() else "there is no such folder"
        raise ConfigError(f"--run {run_folder}: {what}; give the folder of a run that was started, such as runs/NAME")
    config = load_config(path, [*overrides, "hooks=[]"], RunConfig)  # nothing is called between steps
    alone = ParallelConfig(distributed_optimizer=config.parallel.distributed_optimizer)
    train_only = config.data.model_copy(update={"valid": ()})
    bf16 = config.precision.model_copy(update={"fp8": "none", "fp8_first_last_bf16": 0})
    on_cpu = {"platform": "cpu", "transformer_impl": "auto", "parallel": alone, "precision": bf16}
    return config.model_copy(update={**on_cpu, "data": train_only})


@dataclass(frozen=True)
class _Recorded:
    """An objective that records the per-token terms of its loss."""

    inner: Objective
    found: list[Terms] = field(default_factory=list)

    @property
    def process(self) -> NoiseProcess:
        return self.inner.process

    def attention(self, batch: NoisedBatch) -> AttentionPattern:
        return self.inner.attention(batch)

    def loss_tokens(self, batch: NoisedBatch) -> Tensor | None:
        return self.inner.loss_tokens(batch)

    def loss(self, hidden: Tensor, lm_head_weight: Tensor, batch: DeviceBatch, shard: VocabShard) -> LossOutput:
        output = self.inner.loss(hidden, lm_head_weight, batch, shard)
        self.found.append(Terms(*(term.t() for term in output.terms)))
        return output


@dataclass(frozen=True)
class _Opened:
    """A run loaded at the point between two steps."""

    run_folder: Path
    prepared: RunContext
    topology: Topology
    method: Method
    train_step: TrainStep
    recorded: _Recorded
    done: int
    """Number of steps taken so far."""
    start: str

    def take(self, step: int) -> Replayed:
        """Take every step up to this one."""
        loader = sequence_loader(self.prepared, self.method, self.topology, self.done)
        with loader:
            for number in range(self.done + 1, step):
                output = self._take(number, self._sequences_of(number, loader))
                figures = _figures(output)
                skipped = f", no update: {output.decision.skip}" if output.decision.skip else ""
                log.info(f"step {number}: loss {figures['loss']:.4f}, grad norm {figures['grad_norm']:.4f}{skipped}")
            microbatches = self._sequences_of(step, loader)
        return self._described(step, microbatches, self._take(step, microbatches))

    def _sequences_of(self, step: int, loader: Iterator[Microbatch[NoisedBatch]]) -> list[Microbatch[NoisedBatch]]:
        config = self.prepared.config
        return list(islice(loader, config.sizes.sequences(step - 1) // config.batch.micro_batch_size))

    def _take(self, step: int, microbatches: Sequence[Microbatch[NoisedBatch]]) -> StepOutput:
        config = self.prepared.config
        self.recorded.found.clear()
        lr = config.optimizer.lr * config.lr_schedule().factor(step - 1)
        return self.train_step([microbatch.content for microbatch in microbatches], lr)

    def _described(self, step: int, microbatches: Sequence[Microbatch[NoisedBatch]], output: StepOutput) -> Replayed:
        batch = joined_batches([microbatch.content for microbatch in microbatches])
        loss, elbo = (torch.cat([getattr(terms, name) for terms in self.recorded.found]) for name in ("loss", "elbo"))
        samples = [sample for microbatch in microbatches for sample in microbatch.samples]
        sequences = [self._sequence(place, sample, batch, loss, elbo) for place, sample in enumerate(samples)]
        broken = next((sequence.sample for sequence in sequences if not sequence.is_finite), None)
        if broken is None and output.decision.skip == "non_finite":
            broken = self._first_broken_gradient(batch, samples)
        lines = read_metrics(self.run_folder / "metrics.jsonl")
        return Replayed(
            step=step,
            start=self.start,
            steps_between=step - 1 - self.done,
            sequences=sequences,
            batch=batch,
            loss_of_tokens=loss,
            elbo_of_tokens=elbo,
            figures=_figures(output),
            logged=next((line for line in lines if line["step"] == step and "loss" in line), None),
            skip=output.decision.skip,
            broken_sequence=broken,
        )

    def _sequence(self, place: int, sample: int, batch: NoisedBatch, loss: Tensor, elbo: Tensor) -> ReplayedSequence:
        noisy = batch.is_noisy[place]
        count = int(noisy.sum())
        levels = batch.log_snr[place][noisy]
        return ReplayedSequence(
            sample=sample,
            origin=self.prepared.data.at(sample).train.origin(sample),
            log_snr=(float(levels.min()), float(levels.max())) if count else (math.nan, math.nan),
            noisy_tokens=count,
            loss=float(loss[place].double().sum()) / max(count, 1),
            elbo=float(elbo[place].double().sum()) / max(count, 1),
        )

    def _first_broken_gradient(self, batch: NoisedBatch, samples: Sequence[int]) -> int | None:
        """Return the first sequence whose gradient alone is not finite; the weights are still those of the step."""
        alone = replace(
            self.train_step, micro_batch_size=1, check=lambda loss, norm: StepDecision("spike")
        )  # no update
        for place, sample in enumerate(samples):
            sequence = batch.part(slice(place, place + 1))
            if not math.isfinite(alone([sequence], 0.0).grad_norm):
                return sample
        return None


def _open(run_folder: Path, step: int, prepared: RunContext, platform: Platform) -> _Opened:
    """Return the run after its newest sound checkpoint before `step`, or at its beginning."""
    config, text = prepared.config, prepared.tokenizer
    topology = open_topology(prepared.layout)
    chunks, wrapped, optimizer = build_trainables(config, platform, topology, vocab_size=text.vocab_size)
    health = Health(config.health, sizes=config.sizes)
    folder, done = _nearest_checkpoint(run_folder, step, config, topology), 0
    prepared = with_data_of_step(run_folder, step, prepared, folder)
    if folder is not None:
        saved = read_manifest(folder)
        if saved.tokenizer_fingerprint != text.fingerprint:
            raise trained_with(folder, "a tokenizer", saved.tokenizer_fingerprint, text.fingerprint)
        load(folder, chunks, optimizer, is_verified=True, topology=topology, platform=platform)
        health.restore(saved.health)
        done = saved.step
    _, method = build_loss(prepared, platform)
    recorded = _Recorded(method)
    train_step = training_step(prepared, recorded, wrapped, optimizer, topology, platform, check=health.check)
    return _Opened(
        run_folder=run_folder,
        prepared=prepared,
        topology=topology,
        method=method,
        train_step=train_step,
        recorded=recorded,
        done=done,
        start=f"checkpoint {folder.name}" if folder is not None else "the first weights",
    )


def _nearest_checkpoint(run_folder: Path, step: int, config: RunConfig, topology: Topology) -> Path | None:
    """Return the newest sound checkpoint of fewer than `step` steps, the one the run branched from included."""
    own = [folder for folder in step_folders(run_folder) if step_of(folder) < step and is_complete(folder)]
    origin = config.checkpoint.branches_from
    for folder in [*own, *([Path(origin)] if origin is not None else [])]:
        problem = problem_of(folder, topology)
        if problem is None and read_manifest(folder).step < step:
            return folder
        log.warning(problem or f"the run branched from {folder}, after step {step}: that step is another run's")
    if config.checkpoint.weights_only:
        raise CheckpointError(
            f"{run_folder} began with the weights of {config.checkpoint.start_from}, and no checkpoint of its own from "
            f"before step {step} is available; give a later step"
        )
    if origin is not None:
        raise CheckpointError(
            f"{run_folder} branched from {origin}, and neither that nor a checkpoint of its own from before step "
            f"{step} is available; give checkpoint.start_from=PATH, or a later step"
        )
    return None


def _figures(output: StepOutput) -> dict[str, float]:
    found = metrics_of(output.sums.tolist())
    return {"loss": found["loss"], "elbo": found["elbo"], "grad_norm": output.grad_norm}
