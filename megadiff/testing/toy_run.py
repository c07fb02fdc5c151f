"""Real training at toy size: a small corpus, a run description, and the wiring of `megadiff.run.build` on this rank."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megadiff.data.indexed_format import tokenizer_facts
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.metric_lines import read_metrics
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig

with quiet():
    from megadiff.platform.machine import Platform, detect
    from megadiff.run import build
    from megadiff.run.resume import ResumeOptions
    from megadiff.train.loop import Trainer


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "data parallel": (2, {"parallel__distributed_optimizer": True}),
    "tensor parallel": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pipeline": (2, {"parallel__pipeline": 2}),
}
"""Layouts of the checks: number of ranks, and settings of the toy run."""

STEPS, SAVED, KILLED = 6, 3, 5
"""Steps of a toy run, the step of its checkpoint, and the last step that a killed one has logged."""

_MEASURED = re.compile(r"_per_s$|_s$|tflops|peak_bytes|goodput|^mfu$|^hfu$|^attempts$|suggested_save_steps")
"""Keys of a line that depend on the clock or on the process."""


def write_corpus(prefix: Path, *, tokens: int = 6000, seed: int = 0, vocab_size: int = 260) -> Path:
    """Write documents of the byte tokenizer in which each byte depends on the one before, and return their prefix."""
    draw = np.random.default_rng(seed)
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        while writer.num_tokens < tokens:
            steps = draw.integers(1, 4, size=draw.integers(5, 60))
            writer.add_document(4 + np.cumsum(steps) % 50)
        writer.finish(tokenizer=tokenizer_facts(ByteTokenizer()), source_bytes=writer.num_tokens)
    return prefix


def toy_tree(corpus: Path, output: Path, **dotted: Any) -> dict[str, Any]:
    """Return the tree of a toy run; `dotted` sets keys such as `model__layers`."""
    tree: dict[str, Any] = {
        "name": "toy",
        "output_dir": str(output),
        "seed": 3,
        "platform": "cpu",
        "model": {"layers": 4, "hidden": 32, "heads": 4, "seq_length": 16, "head_init": 0.02},
        "noise": {"shift": "balanced"},
        "data": {"train": [str(corpus)], "valid": [str(corpus)], "tokenizer": "byte"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "parallel": {},
        "precision": {"compute": "fp32"},
        "optimizer": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.1, "clip_grad": 1.0},
        "schedule": {"steps": 10, "warmup_steps": 2, "decay_steps": 0.3},
        "checkpoint": {"every": 1000},
        "eval": {"every": 0, "sequences": 7, "num_noise_levels": 2},
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
    """Return `toy_tree` as a checked configuration."""
    return RunConfig.model_validate(toy_tree(corpus, output, **dotted))


@cache
def platform_on_rank() -> Platform:
    """Return the CPU with megatron-core made ready; for forked ranks, so that their parent stays unchanged."""
    platform = detect("cpu")
    platform.prepare_megatron()
    return platform


def wire_on_rank(config: RunConfig, world_size: int, resume_options: ResumeOptions | None = None) -> Trainer:
    """Return the trainer as the training command builds it, on this rank."""
    config.folder.mkdir(parents=True, exist_ok=True)
    platform = platform_on_rank()
    with quiet():
        return build.build_trainer(build.validate_run(config, world_size=world_size), platform, resume_options)


def copy_as_killed(whole: Path, resumed: Path) -> None:
    """Copy a run folder as a kill would have left it between its two checkpoints."""
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / f"checkpoints/step_{STEPS:08d}")
    (resumed / "LATEST").write_text(f"step_{SAVED:08d}\n")
    lines = (resumed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (resumed / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= KILLED))


def figures(config: RunConfig) -> list[dict[str, Any]]:
    """Return the run's training and evaluation lines without what the clock measured."""
    lines = read_metrics(config.folder / "metrics.jsonl")
    return [
        {key: value for key, value in line.items() if not _MEASURED.search(key)}
        for line in lines
        if "loss" in line or "eval_elbo" in line
    ]
