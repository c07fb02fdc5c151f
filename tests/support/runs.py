"""Real runs at toy size: a run description, the wiring of `megadiff.run.build` on forked ranks, and what they
printed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megadiff.data.loader import microbatch_samples
from megadiff.diffusion.noising import NoisedBatch
from megadiff.metric_lines import read_metrics
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig

with quiet():
    from megadiff.testing.toy_run import platform_on_rank, toy_config, toy_tree, wire_on_rank, write_corpus
    from megadiff.train.hooks.checkpoint import CheckpointHook
    from megadiff.train.loop import Trainer


__all__ = ["platform_on_rank", "toy_config", "toy_tree", "wire_on_rank", "write_corpus"]

NOISES = ("masked", "balanced", "uniform")
GIDD_BLOCK = {
    "qk_norm": "full",
    "sink": True,
    "softcap": 30.0,
    "mlp_bias": True,
    "resid_scale": "completep",
    "head_scale": "completep",
}
"""The paper's block, every option of it."""


MODERN_BLOCK = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 12,
    "mlp": "swiglu",
    "ffn_hidden": 40,
    "mlp_bias": True,
    "qkv_bias": True,
    "attention_out_bias": True,
    "tie_embeddings": True,
    "head_init": 0.0,
    "rope_base": 500000.0,
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_seq_length": 8},
}
"""The block that public models share, every option of it."""


@dataclass(frozen=True)
class Trained:
    """Record of one rank of a run."""

    lines: list[dict[str, Any]]
    """Training lines of `metrics.jsonl`."""
    evaluations: list[dict[str, Any]]
    sequence_hashes: dict[int, str]
    """Digest of each noised sequence that this rank saw, by global sample index."""

    def curve(self, key: str) -> list[float]:
        """One figure of the training lines, by step."""
        return [line[key] for line in self.lines]


def train_on_rank(
    config: RunConfig, world_size: int, *, save: bool = False, change: Callable[[Trainer], None] | None = None
) -> Trained:
    """Train on this rank as `pretrain_dlm.py` would.

    Args:
        save: keep the checkpoint hook; saving costs a second or more.
        change: sabotage for a wrong-on-purpose control.
    """
    run = wire_on_rank(config, world_size)
    hashes: dict[int, str] = {}
    run.microbatches = _hashed(run.microbatches, run, config.batch.micro_batch_size, hashes)
    if not save:
        run.hooks = [hook for hook in run.hooks if not isinstance(hook, CheckpointHook)]
    if change is not None:
        change(run)
    run.train()
    lines = read_metrics(config.folder / "metrics.jsonl")
    return Trained([line for line in lines if "loss" in line], [line for line in lines if "eval_elbo" in line], hashes)


class _RequestedAfter:
    """A request to stop that every rank is given after a number of further steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def is_requested(self) -> bool:
        self._left -= 1
        return self._left <= 0

    def reason(self, is_requested: bool) -> str | None:
        return "asked" if is_requested else None

    def honoured(self) -> None:
        pass


def train_until(config: RunConfig, world_size: int, until: int) -> Trained:
    """Train on this rank until a stop is requested after `until` steps of the run, and save there."""

    def stop_there(run: Any) -> None:
        run.stop = _RequestedAfter(until - run.first_step)

    return train_on_rank(config, world_size, save=True, change=stop_there)


def train_all(configs: Sequence[RunConfig], world_size: int, **kwargs: Any) -> list[Trained]:
    """Several runs one after the other in one group of ranks."""
    return [train_on_rank(config, world_size, **kwargs) for config in configs]


def merged_sequences(ranks: Iterable[Trained]) -> dict[int, str]:
    """All ranks' sequences together; ranks that saw the same sample must have seen the same bits."""
    merged: dict[int, str] = {}
    for trained in ranks:
        for sample, digest in trained.sequence_hashes.items():
            assert merged.setdefault(sample, digest) == digest, f"ranks differ in sample {sample}"
    return merged


def largest_relative_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Over two curves of one length."""
    assert len(one) == len(other)
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def _hashed(
    source: Iterator[NoisedBatch], run: Trainer, micro_batch_size: int, hashes: dict[int, str]
) -> Iterator[NoisedBatch]:
    """Hash every sequence on its way from the loader to the step."""

    def add(sample: int, sequence: NoisedBatch) -> None:
        digest = hashlib.sha256()
        for field in sequence.columns().values():
            digest.update(field.numpy().tobytes())
        hashes[sample] = digest.hexdigest()

    return watched(source, run, micro_batch_size, add)


def watched(
    source: Iterator[NoisedBatch], run: Trainer, micro_batch_size: int, see: Callable[[int, NoisedBatch], None]
) -> Iterator[NoisedBatch]:
    """Call `see` with the global sample index and the columns of every sequence on its way to the step."""
    topology = run.step.topology
    for step in range(run.first_step, run.steps):
        for microbatch in range(run.microbatches_of(step)):
            sequences = next(source)
            samples = microbatch_samples(
                run.sizes.samples_before(step),
                micro_batch_size=micro_batch_size,
                dp_rank=topology.data_rank,
                dp_size=topology.layout.data,
                microbatch=microbatch,
            )
            for place, sample in enumerate(samples):
                see(sample, sequences.part(place))
            yield sequences


@contextmanager
def gradient_buckets_of(elements: int) -> Iterator[None]:
    """Give models that are built inside the block gradient buckets of about this many elements."""
    from megadiff.model import denoiser

    whole = denoiser.DistributedDataParallelConfig
    denoiser.DistributedDataParallelConfig = lambda **settings: whole(**settings, bucket_size=elements)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        denoiser.DistributedDataParallelConfig = whole  # type: ignore[misc]
