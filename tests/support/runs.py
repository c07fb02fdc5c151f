"""Real runs at toy size: a run description, the wiring of `megadiff.build` on forked ranks, and what they printed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megadiff.data.indexed_manifest import tokenizer_facts
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.loader import microbatch_samples
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.diffusion.noising import NoisedRows
from megadiff.platform.quiet import quiet
from megadiff.run_config import RunConfig
from megadiff.train.metrics import read_metrics

with quiet():
    from megadiff import build
    from megadiff.platform.machine import Platform, detect
    from megadiff.train.loop import Run, train
    from megadiff.train.saving import Saves

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


@dataclass(frozen=True)
class Trained:
    """What one rank can tell of a run it took part in."""

    lines: list[dict[str, Any]]
    """Training lines of `metrics.jsonl`."""
    evaluations: list[dict[str, Any]]
    row_hashes: dict[int, str]
    """Of every noised row this rank saw, by global sample index."""

    def curve(self, key: str) -> list[float]:
        """One figure of the training lines, by step."""
        return [line[key] for line in self.lines]


def write_corpus(prefix: Path, *, tokens: int = 6000, seed: int = 0, vocab_size: int = 260) -> Path:
    """Documents of the byte tokenizer in which each byte depends on the one before: something to learn."""
    draw = np.random.default_rng(seed)
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        while writer.num_tokens < tokens:
            steps = draw.integers(1, 4, size=draw.integers(5, 60))
            writer.add_document(4 + np.cumsum(steps) % 50)
        writer.finish(tokenizer=tokenizer_facts(ByteTokenizer()), source_bytes=writer.num_tokens)
    return prefix


def toy_tree(corpus: Path, output: Path, **dotted: Any) -> dict[str, Any]:
    """The tree of a toy run; `dotted` sets keys such as `model__layers`."""
    tree: dict[str, Any] = {
        "name": "toy",
        "output_dir": str(output),
        "seed": 3,
        "platform": "cpu",
        "model": {"layers": 4, "hidden": 32, "heads": 4, "seq_length": 16, "head_init": 0.02},
        "noise": {"shift": "balanced"},
        "data": {"train": [str(corpus)], "valid": [str(corpus)], "tokenizer": "byte"},
        "batch": {"global_sequences": 8, "micro_sequences": 2},
        "parallel": {},
        "precision": {"compute": "fp32"},
        "optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.1, "clip_grad": 1.0},
        "schedule": {"steps": 10, "warmup_steps": 2, "cooldown": 0.3},
        "checkpoint": {"every": 1000},
        "eval": {"every": 0, "rows": 7, "noise_levels": 2},
        "log": {"every": 1, "tensorboard": False},
    }
    for key, value in dotted.items():
        *sections, last = key.split("__")
        part = tree
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    return tree


def toy_config(corpus: Path, output: Path, **dotted: Any) -> RunConfig:
    """`toy_tree`, checked."""
    return RunConfig.model_validate(toy_tree(corpus, output, **dotted))


@cache
def platform_on_rank() -> Platform:
    """The CPU, with megatron-core made ready; for ranks only, the parent stays clean."""
    platform = detect("cpu")
    platform.prepare_megatron()
    return platform


def wire_on_rank(config: RunConfig, world_size: int, resumption: build.Resumption | None = None) -> Run:
    """The real wiring on this rank."""
    config.folder.mkdir(parents=True, exist_ok=True)
    platform = platform_on_rank()
    with quiet():
        return build.wire(build.prepare(config, world_size=world_size), platform, resumption)


def train_on_rank(
    config: RunConfig, world_size: int, *, save: bool = False, change: Callable[[Run], None] | None = None
) -> Trained:
    """Train on this rank as `pretrain_dlm.py` would.

    Args:
        save: keep the checkpoint hook; saving costs a second or more.
        change: sabotage for a wrong-on-purpose control.
    """
    run = wire_on_rank(config, world_size)
    hashes: dict[int, str] = {}
    run.rows = _hashed(run.rows, run, config.batch.micro_sequences, hashes)
    if not save:
        run.hooks = [hook for hook in run.hooks if not isinstance(hook, Saves)]
    if change is not None:
        change(run)
    train(run)
    lines = read_metrics(config.folder / "metrics.jsonl")
    return Trained([line for line in lines if "loss" in line], [line for line in lines if "eval_elbo" in line], hashes)


def train_all(configs: Sequence[RunConfig], world_size: int, **kwargs: Any) -> list[Trained]:
    """Several runs one after the other in one group of ranks."""
    return [train_on_rank(config, world_size, **kwargs) for config in configs]


def merged_rows(ranks: Iterable[Trained]) -> dict[int, str]:
    """All ranks' rows together; ranks that saw the same sample must have seen the same bits."""
    merged: dict[int, str] = {}
    for trained in ranks:
        for sample, digest in trained.row_hashes.items():
            assert merged.setdefault(sample, digest) == digest, f"ranks differ in sample {sample}"
    return merged


def largest_relative_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Over two curves of one length."""
    assert len(one) == len(other)
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def _hashed(
    source: Iterator[NoisedRows], run: Run, micro_sequences: int, hashes: dict[int, str]
) -> Iterator[NoisedRows]:
    """Hash every row on its way from the loader to the step."""
    topology = run.step.topology
    for step in range(run.first_step, run.steps):
        for microbatch in range(run.microbatches_of(step)):
            rows = next(source)
            samples = microbatch_samples(
                run.sizes.samples_before(step),
                micro_sequences=micro_sequences,
                dp_rank=topology.data_rank,
                dp_size=topology.layout.data,
                microbatch=microbatch,
            )
            for place, sample in enumerate(samples):
                digest = hashlib.sha256()
                for field in rows:
                    digest.update(field[place].numpy().tobytes())
                hashes[sample] = digest.hexdigest()
            yield rows
