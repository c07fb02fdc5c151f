"""Muon where weights are cut in every way, and what it takes for the matrices of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.optim.pieces import Piece, piece_of
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from tests.support.ranks import on_ranks
from tests.support.runs import (
    Trained,
    gradient_buckets_of,
    largest_relative_difference,
    platform_on_rank,
    toy_config,
    train_all,
)

BUCKET = 5000
"""Elements of a gradient bucket, few enough that four ranks share matrices by twos and threes."""


def _train_in_small_buckets(configs: Sequence[RunConfig], world_size: int) -> tuple[list[Trained], set[int]]:
    """Return the runs, and the numbers of ranks that share a matrix."""
    from megadiff.optim.muon import Muon

    step, shared = Muon.step, set[int]()

    def watched(self: Any, closure: Any = None) -> Any:
        matrices = [p for group in self.param_groups for p in group["params"] if piece_of(p).role == "hidden"]
        shared.update(len(piece_of(p).parts) for p in matrices)
        return step(self, closure)

    Muon.step = watched  # type: ignore[method-assign]
    with gradient_buckets_of(BUCKET):
        return train_all(configs, world_size), shared


def test_matrices_in_several_parts_are_updated_as_in_one_process(toy_corpus: Path, tmp_path: Path) -> None:
    overlap = {
        "parallel__distributed_optimizer": True,
        "parallel__overlap_grad_reduce": True,
        "parallel__overlap_param_gather": True,
        "batch__micro_batch_size": 1,
    }
    common = {"schedule__steps": 5, "optimizer__name": "muon", "optimizer__lr": 1e-2, "data__valid": []}
    size = {"model__layers": 2}
    ((one,),) = on_ranks(1, train_all, [toy_config(toy_corpus, tmp_path, name="one", **common, **size)], 1)
    config = toy_config(toy_corpus, tmp_path, name="four", **common, **size, **overlap)
    (four,), shared = on_ranks(4, _train_in_small_buckets, [config], 4)[0]
    assert {2, 3} <= shared
    for key in ("loss", "elbo", "grad_norm"):
        assert largest_relative_difference(four.curve(key), one.curve(key)) < 1e-5, key


HEADS, WIDTH = 4, 64


def _products(tensor: int) -> dict[str, Any]:
    """Return how far products with the packed matrices are from the layer's own, and how weights are cut."""
    with quiet():
        from megadiff.model.config import ModelConfig, PrecisionConfig
        from megadiff.model.denoiser import build_chunks
        from megadiff.model.initialisation import initialise
        from megadiff.parallel.config import Layout, ParallelConfig
        from megadiff.parallel.topology import open_topology

        platform, topology = platform_on_rank(), open_topology(Layout(tensor, 1, 1, 1, 1))
        model = ModelConfig(layers=1, hidden=WIDTH, heads=HEADS, seq_length=16, qk_norm="none")
        chunks = build_chunks(
            model,
            vocab_size=260,
            parallel=ParallelConfig(tensor=tensor),
            precision=PrecisionConfig(compute="fp32"),
            platform=platform,
            topology=topology,
        )
    initialise(chunks, model, seed=0, topology=topology)
    (layer,) = chunks[0].decoder.layers
    attention, mlp = layer.self_attention, layer.mlp
    weight = attention.linear_qkv.weight
    stacks = Piece("hidden", weight.shape, weight.packed_rows).matrices(weight.detach())
    matrices = [matrix for stack in stacks for matrix in stack]
    states = torch.randn(5, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = attention.get_query_key_value_tensors(states)[:3]
    parts = {"qkv": weight, "out": attention.linear_proj.weight}
    parts |= {"up": mlp.linear_fc1.weight, "down": mlp.linear_fc2.weight}
    return {
        "apart": [
            float((states[:, 0] @ one.T - other.reshape(5, -1)).abs().max())
            for one, other in zip(matrices, theirs, strict=True)
        ],
        "cut": {name: part.partition_dim for name, part in parts.items() if part.tensor_model_parallel},
    }


@pytest.mark.parametrize("tensor", [1, 2])
def test_packed_matrices_are_those_of_queries_keys_and_values(tensor: int) -> None:
    for found in on_ranks(tensor, _products, tensor):
        assert found["apart"] == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
        assert found["cut"] == {"qkv": 0, "out": 1, "up": 0, "down": 1}
