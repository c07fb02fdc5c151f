"""First weights as a function of (seed, parameter name, global index): every layout starts from the same model.

megatron-core's own initialisation depends on the order in which a stage draws, so it differs between pipeline
layouts. Here each parameter's role gives its standard deviation and each block of its global rows has its own
generator; a rank draws only the blocks it holds a part of.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from megadiff.model.config import ModelConfig
from megadiff.parallel.topology import Topology

Role = Literal["embedding", "head", "hidden", "norm", "bias"]

_ROWS_PER_BLOCK = 256
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def role_of(name: str) -> Role:
    """Return the role of a parameter by its name; it decides its initialisation and its optimizer group.

    The order follows arXiv:2512.10858's released code: norms first, then embedding, biases (the attention sink's key
    and value among them), head, and what is left are the blocks' matrices.
    """
    if "norm" in name:
        return "norm"
    if "embedding" in name:
        return "embedding"
    if name.endswith("bias") or "sink_" in name:
        return "bias"
    return "head" if "output_layer" in name else "hidden"


def global_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """`named_parameters` of one model chunk with the layer numbers of the whole model (0-based).

    A tied head, which a last stage without the embedding has, has the embedding's name.
    """
    layers = chunk.decoder.layers  # type: ignore[union-attr]
    for name, parameter in chunk.named_parameters():
        if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"
        yield _LAYER.sub(lambda m: f"decoder.layers.{layers[int(m[1])].layer_number - 1}.", name), parameter  # type: ignore[index,operator]


@torch.no_grad()
def initialise(chunks: Sequence[torch.nn.Module], model: ModelConfig, *, seed: int, topology: Topology) -> None:
    """Draw the first weights in place: normal for matrices, zero for norm offsets, biases and sinks.

    Standard deviations: `init_scale / sqrt(hidden)` for all block matrices (also the MLP's second), `embed_init`,
    `head_init`; not truncated. Source: arXiv:2512.10858, CompleteP table.
    """
    std = {
        "hidden": model.init_scale / model.hidden**0.5,
        "embedding": model.embed_init,
        "head": model.head_init,
        "norm": 0.0,
        "bias": 0.0,
    }
    with ThreadPoolExecutor(_threads()) as pool:
        for chunk in chunks:
            for name, parameter in global_parameters(chunk):
                if (deviation := std[role_of(name)]) == 0.0:
                    parameter.zero_()
                else:
                    _draw(pool, parameter, name, deviation, seed, topology)


def _threads() -> int:
    """Return this rank's share of the node's cores: one draws some 70 million numbers a second, a model has more."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _draw(pool: ThreadPoolExecutor, parameter: Tensor, name: str, std: float, seed: int, topology: Topology) -> None:
    """Fill a rank's part of a matrix from its global rows, block by block, each from its own generator."""
    cut = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
    rows, columns = parameter.shape
    parts = topology.layout.tensor
    first_row = topology.tensor_rank * rows if cut == 0 else 0
    all_columns = columns * parts if cut == 1 else columns
    column = slice(topology.tensor_rank * columns, (topology.tensor_rank + 1) * columns) if cut == 1 else slice(None)

    @torch.no_grad()  # grad mode is a thread's own
    def fill(block: int) -> None:
        start = block * _ROWS_PER_BLOCK
        drawn = torch.randn(_ROWS_PER_BLOCK, all_columns, generator=_generator(seed, name, block)) * std
        low, high = max(start, first_row), min(start + _ROWS_PER_BLOCK, first_row + rows)
        parameter[low - first_row : high - first_row].copy_(drawn[low - start : high - start, column])

    blocks = range(first_row // _ROWS_PER_BLOCK, -(-(first_row + rows) // _ROWS_PER_BLOCK))
    for _ in pool.map(fill, blocks):  # raises what a block raised
        pass


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"init/{seed}/{name}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
