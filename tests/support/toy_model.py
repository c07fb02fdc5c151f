"""A one-rank model through the real builders, for tests that look inside it; call on a forked rank."""

from __future__ import annotations

from typing import Any

from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.parallel.config import Layout, ParallelConfig
from megadiff.platform.quiet import quiet
from tests.support.runs import platform_on_rank

with quiet():
    from megadiff.model.denoiser import build_chunks
    from megadiff.model.initialisation import initialise
    from megadiff.parallel.topology import Topology, open_topology

SMALL: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "seq_length": 16, "head_init": 0.02}


def model_config(**changes: Any) -> ModelConfig:
    """A small model's description."""
    return ModelConfig.model_validate({**SMALL, **changes})


def build_on_rank(
    model: ModelConfig, *, tensor: int = 1, pipeline: int = 1, virtual: int = 1, vocab_size: int = 260, seed: int = 0
) -> tuple[list[Any], Topology]:
    """This rank's initialised float32 chunks and its place."""
    platform = platform_on_rank()
    topology = open_topology(Layout(tensor, pipeline, virtual, 1, pipeline))
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
    chunks = build_chunks(
        model,
        vocab_size=vocab_size,
        parallel=parallel,
        precision=PrecisionConfig(compute="fp32"),
        platform=platform,
        topology=topology,
    )
    initialise(chunks, model, seed=seed, topology=topology)
    return chunks, topology
