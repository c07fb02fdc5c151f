"""The estimate of activation memory against the tensors that a real build saves, on every kind of layout."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from megadiff.model import cost
from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.parallel.config import Layout, ParallelConfig
from megadiff.platform.quiet import quiet
from megadiff.run.dry_run import saved_bytes
from tests.support.ranks import on_ranks
from tests.support.runs import platform_on_rank

with quiet():
    from megadiff.model.denoiser import build_chunks, wrap_data_parallel
    from megadiff.parallel.topology import open_topology

VOCAB, BATCH = 500, 2
MODEL = {"layers": 6, "hidden": 128, "heads": 4, "seq_length": 96}
GIDD = {"qk_norm": "full", "sink": True, "mlp_bias": True}

LLAMA = {"qk_norm": "none", "kv_heads": 2, "mlp": "swiglu", "ffn_hidden": 320, "qkv_bias": True}


class Case(NamedTuple):
    """A build to count on, and its parallel settings."""

    compute: str
    parallel: Mapping[str, Any] = MappingProxyType({})
    model: Mapping[str, Any] = MappingProxyType({})


ONE = {
    "float32": Case("fp32"),
    "bf16": Case("bf16"),
    "bf16, the paper's block": Case("bf16", model=GIDD),
    "float32, the paper's block": Case("fp32", model=GIDD),
    "bf16, no q and k norm": Case("bf16", model={"qk_norm": "none"}),
    "bf16, all heads normalised": Case("bf16", model={"qk_norm": "full"}),
    "float32, all heads normalised": Case("fp32", model={"qk_norm": "full"}),
    "bf16, a sink": Case("bf16", model={"sink": True}),
    "float32, a sink": Case("fp32", model={"sink": True}),
    "bf16, capped scores": Case("bf16", model={"softcap": 30.0}),
    "capped scores recomputed": Case(
        "bf16", {"recompute": "selective", "recompute_modules": ("core_attn",)}, {"softcap": 30.0}
    ),
    "full": Case("bf16", {"recompute": "full"}),
    "full, some layers": Case("fp32", {"recompute": "full", "recompute_layers": 2}),
    "bf16, llama's block": Case("bf16", model=LLAMA),
    "float32, llama's block": Case("fp32", model=LLAMA),
    "bf16, shared keys repeated": Case("bf16", model={"kv_heads": 2, "sink": True}),
    "float32, shared keys repeated": Case("fp32", model={"kv_heads": 2, "sink": True, "qk_norm": "none"}),
    "float32, one key normalised": Case("fp32", model={"kv_heads": 1}),
    "float32, two keys normalised": Case("fp32", model={"kv_heads": 2}),
    "bf16, gelu": Case("bf16", model={"mlp": "gelu"}),
    "mlp": Case("bf16", {"recompute": "selective"}),
    "mlp, llama's block": Case("bf16", {"recompute": "selective"}, model=LLAMA),
    "mlp and norms": Case("bf16", {"recompute": "selective", "recompute_modules": ("mlp", "layernorm")}),
    "norms": Case("fp32", {"recompute": "selective", "recompute_modules": ("layernorm",)}),
    "attention": Case("bf16", {"recompute": "selective", "recompute_modules": ("core_attn",)}),
}
CUT = {
    "tensor": Case("bf16", {"tensor": 2}),
    "tensor, float32": Case("fp32", {"tensor": 2}),
    "sequence": Case("bf16", {"tensor": 2, "sequence": True}),
    "sequence, the paper's block": Case("bf16", {"tensor": 2, "sequence": True}, GIDD),
    "sequence, llama's block": Case("bf16", {"tensor": 2, "sequence": True}, LLAMA),
    "sequence, full": Case("bf16", {"tensor": 2, "sequence": True, "recompute": "full"}),
}
PIPED = {
    "stages": Case("bf16", {"pipeline": 3}),
    "stages, float32": Case("fp32", {"pipeline": 3}),
}


def _counted(cases: dict[str, Case]) -> dict[str, int]:
    """Bytes that this rank's chunk saves for one microbatch, the output head and the loss left out."""
    platform, found = platform_on_rank(), {}
    for name, case in cases.items():
        parallel = ParallelConfig.model_validate(dict(case.parallel))
        model = ModelConfig.model_validate({**MODEL, **case.model})
        precision = PrecisionConfig.model_validate({"compute": case.compute})
        topology = open_topology(Layout(parallel.tensor, parallel.pipeline, 1, 1, parallel.pipeline))
        chunks = build_chunks(
            model, vocab_size=VOCAB, parallel=parallel, precision=precision, platform=platform, topology=topology
        )
        (chunk,) = wrap_data_parallel(chunks, parallel=parallel, precision=precision)
        ids = torch.arange(BATCH * model.seq_length).reshape(BATCH, -1) % VOCAB
        if not topology.is_first_stage:
            dtype = torch.bfloat16 if case.compute == "bf16" else torch.float32
            length = model.seq_length // (parallel.tensor if parallel.sequence else 1)
            chunks[0].set_input_tensor(torch.randn(length, BATCH, model.hidden).to(dtype).requires_grad_())
        there = [*chunk.parameters(), *chunks[0].buffers(), *(p.main_grad for p in chunk.parameters()), ids]
        found[name] = saved_bytes(
            lambda chunk=chunk, ids=ids: chunk(ids, None, loss_fn=lambda hidden, _: hidden), apart_from=there
        )
    return found


def _estimated(case: Case, stage: int) -> int:
    parallel = ParallelConfig.model_validate(dict(case.parallel))
    model = ModelConfig.model_validate({**MODEL, **case.model})
    shape = model.shape(vocab_size=VOCAB)
    full = parallel.recompute_layers or model.layers // parallel.pipeline
    layout = cost.Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        sequence=parallel.sequence,
        micro_batch_size=BATCH,
        recompute_layers=full if parallel.recompute == "full" else 0,
        recompute_modules=parallel.recomputed_modules,
    )
    precision = cost.Precision(params=case.compute, compute=case.compute)
    return cost.stage_memory(shape, layout, precision, stage=stage).activations_per_microbatch


@pytest.fixture(scope="module")
def counted():
    return {1: on_ranks(1, _counted, ONE), 2: on_ranks(2, _counted, CUT), 3: on_ranks(3, _counted, PIPED)}


@pytest.mark.parametrize(
    ("ranks", "name", "stage"),
    [
        *((1, name, 0) for name in ONE),
        *((2, name, 0) for name in CUT),
        *((3, name, stage) for name in PIPED for stage in range(3)),
    ],
)
def test_the_estimate_is_within_a_tenth_of_what_is_saved(counted, ranks, name, stage):
    case = {**ONE, **CUT, **PIPED}[name]
    wanted = counted[ranks][stage if ranks == 3 else 0][name]
    assert _estimated(case, stage) == pytest.approx(wanted, rel=0.1)
