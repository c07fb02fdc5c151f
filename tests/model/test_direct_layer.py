"""The layer's own forward pass against megatron-core's, bit for bit, and against its compiled form, to rounding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, MODERN_BLOCK, platform_on_rank
from tests.support.toy_model import model_config

VOCAB = 100
LENGTH = 16
PATTERNS = {
    "full": None,
    "causal": [-LENGTH, -LENGTH, -LENGTH],
    "prompts": [0, 5, 7],
    "causal prompts": [-3, -LENGTH, -3],
    "documents": [[LENGTH, 0, 0], [3, 5, 8], [15, 1, 0]],
    "causal documents": [[-LENGTH, 0, 0], [-3, -5, -8], [-15, -1, 0]],
}
BLOCKS = {
    "plain": {"hidden": 64, "heads": 2},
    "gidd": GIDD_BLOCK,
    "no norms of queries and keys": {"qk_norm": "none"},
    "narrow heads": {"hidden": 24, "heads": 4},
    "llama": MODERN_BLOCK,
    "shared keys, a cap, a sink": {**GIDD_BLOCK, "kv_heads": 2},
}


def _megatrons_parts():
    """The parts with megatron-core's own layer and matrices."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megadiff.model.layers import local_parts

    class Row(RowParallelLinear):
        def __init__(self, *args, skip_bias_add=False, **kwargs):
            super().__init__(*args, skip_bias_add=False, **kwargs)

    parts = {"column": ColumnParallelLinear, "row": Row}
    return replace(local_parts(), layer=TransformerLayer, **parts)


def _chunk(model, compute, **precision):
    """A whole model with random weights, the same for the same description."""
    from megadiff.model.config import PrecisionConfig
    from megadiff.model.denoiser import build_chunks
    from megadiff.parallel.config import Layout, ParallelConfig
    from megadiff.parallel.topology import open_topology

    (chunk,) = build_chunks(
        model,
        vocab_size=VOCAB,
        parallel=ParallelConfig(),
        precision=PrecisionConfig(compute=compute, **precision),
        platform=platform_on_rank(),
        topology=open_topology(Layout(1, 1, 1, 1, 1)),
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return chunk


def _outputs(chunk):
    """Logits for every attention pattern, and the gradients of their squares' sum."""
    ids = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    found = {}
    for name, codes in PATTERNS.items():
        logits = chunk(ids, None if codes is None else torch.tensor(codes))
        logits.float().square().sum().backward()
        found[name] = logits.detach()
    return found | {name: p.grad for name, p in chunk.named_parameters()}


def _against_megatron(blocks):
    """Names of the tensors that differ, by block and dtype."""
    from megadiff.model.layers import DirectLayer

    differing = {}
    for name, block in blocks.items():
        for compute in ("fp32", "bf16"):
            model = model_config(**block, seq_length=LENGTH)
            own = _chunk(model, compute)
            assert all(type(layer) is DirectLayer for layer in own.decoder.layers)
            with patch("megadiff.model.denoiser.modules_for", lambda *_: _megatrons_parts()):
                other = _chunk(model, compute)
            assert not any(isinstance(layer, DirectLayer) for layer in other.decoder.layers)
            mine, theirs = _outputs(own), _outputs(other)
            assert mine.keys() == theirs.keys()
            differing[name, compute] = [key for key in mine if not torch.equal(mine[key], theirs[key])]
    return differing


def test_layers_equal_megatrons_bit_for_bit():
    differing = on_ranks(1, _against_megatron, BLOCKS)[0]
    assert len(differing) == 2 * len(BLOCKS)
    assert not any(differing.values()), differing


def _compiled():
    """Relative difference of each gradient and the graphs made so far, by attention pattern, and whether evaluation
    is the same."""
    from torch._dynamo.utils import counters

    model = model_config(layers=1, seq_length=LENGTH)
    eager, compiled = _chunk(model, "fp32"), _chunk(model, "fp32", compile=True)
    ids = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    graphs, differences = {}, {}
    for name in ("prompts", "documents", "causal"):
        codes = torch.tensor(PATTERNS[name])
        for chunk in (eager, compiled):
            chunk.zero_grad()
            chunk(ids, codes).square().sum().backward()
        graphs[name] = counters["stats"]["unique_graphs"]
        differences[name] = [
            float((one.grad - other.grad).norm() / other.grad.norm())
            for one, other in zip(compiled.parameters(), eager.parameters(), strict=True)
        ]
    with torch.no_grad():
        same = torch.equal(eager(ids, codes), compiled(ids, codes))
        same &= torch.equal(eager.eval()(ids, None), compiled.eval()(ids, None))
    return differences, graphs, same


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_blocks_have_the_gradients_of_plain_ones():
    """Sequences with prompts or documents of their own and evaluation are not compiled: they agree in every bit."""
    differences, graphs, same = on_ranks(1, _compiled)[0]
    assert graphs == {"prompts": 0, "documents": 0, "causal": 1}
    assert max(differences["prompts"]) == max(differences["documents"]) == 0.0
    assert 0.0 < max(differences["causal"]) < 2e-6
    assert same
