"""FP8 matrix products: megatron-core's settings for a recipe, and the shapes they can have."""

from __future__ import annotations

from typing import Any

from megadiff.errors import ConfigError
from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.parallel.config import ParallelConfig

_AMAX_HISTORY = 1024
"""Steps whose largest values `delayed` looks back on; Transformer Engine's own default."""


def megatron_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the arguments of megatron-core's `TransformerConfig`; none without FP8.

    Forward E4M3, gradients E5M2 (`hybrid`), except with `blockwise`, whose scales follow the values closely enough for
    E4M3 everywhere (Transformer Engine's default for it).
    """
    if precision.fp8 == "none":
        return {}
    ends = precision.fp8_first_last_bf16
    return {
        "fp8": "e4m3" if precision.fp8 == "blockwise" else "hybrid",
        "fp8_recipe": precision.fp8,
        "fp8_amax_history_len": _AMAX_HISTORY,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": ends > 0,
        "num_layers_at_start_in_bf16": ends,
        "num_layers_at_end_in_bf16": ends,
    }


def check_shapes(
    precision: PrecisionConfig, model: ModelConfig, parallel: ParallelConfig, *, micro_batch_size: int
) -> None:
    """Check that every FP8 matrix product of a rank has a shape the hardware takes.

    Both operands are multiplied along either side once (forward, and for the gradients of input and weight), so every
    side counts: the widths on this rank, and the tokens of a microbatch. Each must be a multiple of 16 (Transformer
    Engine, `assert_dim_for_fp8_exec`, and FP8 products of cuBLAS). With sequence parallelism a rank quantises its own
    part of the tokens before they are gathered, `blockwise` in whole blocks of 128 of tokens and width.

    Raises:
        ConfigError: the first side that is not, and what would do. Nothing without FP8.
    """
    if precision.fp8 == "none":
        return
    multiple = 128 if precision.fp8 == "blockwise" and parallel.sequence else 16
    tensor = parallel.tensor
    tokens, parts = micro_batch_size * model.seq_length, tensor if parallel.sequence else 1
    sides = {
        "model.hidden": (model.hidden, multiple),
        "model.hidden / parallel.tensor": (model.hidden // tensor, 16),
        "model.heads x model.head_dim / parallel.tensor": (model.heads * model.head_width // tensor, 16),
        "model.kv_heads x model.head_dim / parallel.tensor": (model.key_heads * model.head_width // tensor, 16),
        "the MLP width / parallel.tensor": (model.mlp_width // tensor, 16),
        "batch.micro_batch_size x model.seq_length" + (" / parallel.tensor" if parts > 1 else ""): (
            tokens // parts,
            multiple,
        ),
    }
    for name, (value, wanted) in sides.items():
        if value % wanted:
            lower = value - value % wanted
            raise ConfigError(
                f"precision.fp8={precision.fp8} needs {name} to be a multiple of {wanted}, found {value}; "
                f"{f'{lower} or ' if lower else ''}{lower + wanted} would do"
            )
    if precision.fp8_first_last_bf16 > model.layers // parallel.pipeline:
        raise ConfigError(
            f"precision.fp8_first_last_bf16 is {precision.fp8_first_last_bf16}, but a pipeline stage has "
            f"{model.layers // parallel.pipeline} blocks; megatron-core wants at most that"
        )
