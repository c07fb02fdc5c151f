"""Checkpoints to be exported, trained for four steps on several layouts, and the trainer's own logits."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from megadiff.parallel.attention_pattern import AttentionPattern
from megadiff.platform.quiet import quiet
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, toy_config, train_on_rank

with quiet():
    from megadiff.checkpoint.load import load
    from megadiff.checkpoint.manifest import read_manifest
    from megadiff.model.config import ModelConfig, PrecisionConfig
    from megadiff.model.denoiser import build_chunks
    from megadiff.parallel.config import Layout, ParallelConfig
    from megadiff.parallel.pipeline import run_microbatches
    from megadiff.parallel.topology import open_topology
    from megadiff.run.load_model import load_model
    from megadiff.testing.toy_run import platform_on_rank

SOFTCAP = 5.0
"""Lower than the paper's, so that scores of a toy feel it."""


def trained(corpus: Path, output: Path, ranks: int, **changes: Any) -> Path:
    """Train a GIDD block with a non-zero head for four steps; the step folder."""
    block = {f"model__{key}": value for key, value in {**GIDD_BLOCK, "softcap": SOFTCAP}.items()}
    settings = {**block, "model__head_init": 0.02, "model__embed_init": 0.5, "model__init_scale": 2.0}
    settings |= {"conditioning__prompt": 0.5, "data__valid": [], "schedule__steps": 4, "optimizer__lr": 0.05}
    config = toy_config(corpus, output, **{**settings, **changes})
    on_ranks(ranks, train_on_rank, config, ranks, save=True)
    return config.folder / "checkpoints/step_00000004"


def sequences_with_prompts(*, length: int = 16) -> list[tuple[int, torch.Tensor]]:
    """Sequences [2, length], and how many of their tokens are a clean prompt."""
    draw = torch.Generator().manual_seed(1)
    return [(prompt, torch.randint(0, 260, (2, length), generator=draw)) for prompt in (0, 5, length)]


def trainer_logits(folder: Path, sequences: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
    """The trainer's float32 logits [2, length, V] of the sequences; from a forked process, as this one stays clean."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return [torch.from_numpy(found) for found in pool.submit(_logits, folder, sequences).result()]


@torch.no_grad()
def _logits(folder: Path, sequences: list[tuple[int, torch.Tensor]]) -> list[Any]:
    with load_model(folder, platform="cpu") as model:
        config = model.manifest.config
        is_autoregressive = config["method"]["name"] == "next_token"
        is_causal = config["conditioning"]["prompt_attention"] == "causal" or is_autoregressive
        found = []
        for prompt, ids in sequences:
            length = ids.shape[1] if is_autoregressive else prompt
            pattern = AttentionPattern.prefix(torch.full((len(ids),), length), is_causal=is_causal)
            logits = model.chunks[0](ids, pattern.codes())
            found.append(logits.transpose(0, 1)[..., : model.process.vocab_size].contiguous().numpy())
        return found


def layout_logits(folder: Path, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The float32 logits [B, L, V] of a checkpoint loaded by the ranks of a layout, attention by its own method."""
    parts = on_ranks(layout.world_size, _part_of_logits, folder, ids, layout)
    return torch.cat([torch.from_numpy(part) for part in parts if part is not None], dim=-1)


def _part_of_logits(folder: Path, ids: torch.Tensor, layout: Layout) -> Any:
    """This rank's columns of the vocabulary; None on ranks without the head."""
    platform, topology = platform_on_rank(), open_topology(layout)
    manifest = read_manifest(folder)
    model = ModelConfig.model_validate(manifest.config["model"])
    parallel = ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline, sequence=layout.tensor > 1)
    chunks = build_chunks(
        model,
        vocab_size=manifest.vocab_size,
        parallel=parallel,
        precision=PrecisionConfig(compute="fp32"),
        platform=platform,
        topology=topology,
    )
    load(folder, chunks, None, topology=topology, platform=platform)
    is_causal = manifest.config["method"]["name"] == "next_token"
    codes = AttentionPattern.causal(*ids.shape).codes() if is_causal else None
    one = torch.ones((), dtype=torch.int32)
    found = run_microbatches(
        chunks,
        [ids],
        forward=lambda chunk, _: chunk(ids, codes),
        loss=lambda logits, _: (logits.sum(), one, logits),
        seq_length=ids.shape[1],
        micro_batch_size=len(ids),
        forward_only=True,
    )
    if not found:
        return None
    columns = found[0].transpose(0, 1).detach()
    start = topology.tensor_rank * columns.shape[-1]
    return columns[..., : max(0, manifest.vocab_size - start)].contiguous().numpy()
