"""The model of exported folders with random weights, and a model that adds up the time of its passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Timed:
    """A model that adds up the CPU seconds of its passes in `taken`."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self._model, self.taken = model, 0.0

    def __call__(self, *arguments: Any) -> Tensor:
        """Return the model's result."""
        began = time.process_time()
        result = self._model(*arguments)
        self.taken += time.process_time() - began
        return result


def exported_model(
    *, vocab_size: int, layers: int, hidden: int, length: int, heads: int | None = None, **more: Any
) -> Any:
    """Return the exported model, its weights the same in every process.

    Args:
        vocab_size: number of ids with the mask.
        layers: number of blocks.
        hidden: width.
        length: longest sequence.
        heads: number of attention heads; None for heads of 64.
        more: further keys of its `config.json`.
    """
    from megadiff.export.huggingface.configuration_gidd import GiddConfig
    from megadiff.export.huggingface.modeling_gidd import GiddForDiffusionLM

    torch.manual_seed(0)
    config = GiddConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads or max(1, hidden // 64),
        max_position_embeddings=length,
        head_init_scale=0.05,
        **more,
    )
    return GiddForDiffusionLM(config).eval()


def timed_model(**size: int) -> Timed:
    """Return the exported model as a function of ids [B, L] and a second argument that it ignores to logits [B, L, V].

    Args:
        size: arguments of `exported_model`.
    """
    model = exported_model(**size)
    return Timed(lambda ids, _: model(ids).logits)
