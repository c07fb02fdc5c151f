"""Configuration of a run's layout over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pydantic import Field, model_validator

from megadiff.config.section import Section
from megadiff.errors import ConfigError

_MOST_CHOICES = 8
"""Numbers that a message lists at most."""


class ParallelConfig(Section):
    """Section `parallel:` the layout. The data-parallel size is ranks / (tensor x pipeline)."""

    tensor: int = Field(default=1, ge=1)
    """Number of ranks that share every matrix (tensor parallelism)."""
    pipeline: int = Field(default=1, ge=1)
    """Number of stages that the layers are divided into (pipeline parallelism)."""
    virtual_pipeline: int = Field(default=1, ge=1)
    """Number of model chunks per stage, interleaved; 1 is the plain one-forward-one-backward schedule."""
    sequence: bool = False
    """Whether to shard activations along the sequence between tensor-parallel regions; needs tensor > 1."""
    distributed_optimizer: bool = False
    """Whether to shard optimizer state and master weights over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Whether to reduce gradients while the backward pass is still running."""
    overlap_param_gather: bool = False
    """Whether to gather updated weights during the next forward pass; needs both options above."""
    tp_comm_overlap: bool = False
    """Whether to overlap tensor-parallel communication with the matrix products it belongs to, through Transformer
    Engine's buffers; needs `sequence`, a GPU, and tensor groups that do not span nodes.
    """
    gradient_accumulation_fusion: bool | Literal["auto"] = "auto"
    """Fusion of weight-gradient accumulation, in the float32 buffer, with the matrix product (GPU and bf16 with master
    weights only). `auto` uses it if available; true requires it.
    """
    recompute: Literal["none", "selective", "full"] = "none"
    """Kind of activation recomputation in the backward pass, to save memory: only the input of whole blocks is kept
    (`full`, about a third more compute), or everything except `recompute_modules` (`selective`).
    """
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp"], ...] = ()
    """Modules to recompute with `selective`; if empty, the MLP. `core_attn` saves memory only with `model.softcap` (a
    fused kernel stores no scores); `layernorm` has no effect if Transformer Engine's layers contain the norms.
    """
    recompute_layers: int | None = Field(default=None, ge=1)
    """Number of blocks of each model chunk to recompute with `full`; unset, all."""

    @model_validator(mode="after")
    def _recompute_fits(self) -> ParallelConfig:
        for key, wanted in (("recompute_modules", "selective"), ("recompute_layers", "full")):
            if getattr(self, key) and self.recompute != wanted:
                raise ValueError(
                    f"parallel.{key} goes with parallel.recompute={wanted} only (found {self.recompute}); set that, or "
                    "leave it out"
                )
        return self

    @property
    def recomputed_modules(self) -> tuple[str, ...]:
        """Modules that selective recomputation recomputes; empty without it."""
        return (self.recompute_modules or ("mlp",)) if self.recompute == "selective" else ()

    @property
    def ranks_per_replica(self) -> int:
        """Number of ranks that hold one copy of the model."""
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class Layout:
    """A `ParallelConfig` on a world of known size, with every division checked."""

    tensor: int
    pipeline: int
    virtual_pipeline: int
    data: int
    num_microbatches: int
    """Number of microbatches that each data-parallel rank runs per optimizer step."""

    @cached_property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data


def lay_out(
    parallel: ParallelConfig,
    *,
    world_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    mlp_width: int,
    padded_vocab_size: int,
    seq_length: int,
    global_batch_size: int,
    micro_batch_size: int,
) -> Layout:
    """Check that everything divides, before any process group exists.

    The rules are megatron-core's, most of which are checked by its own argument parser but not by its core.

    Raises:
        ConfigError: a rule is violated; names the first one, with the numbers and valid alternatives.
    """
    tensor, pipeline, virtual = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline
    replica = parallel.ranks_per_replica
    if world_size % replica:
        raise ConfigError(
            f"the run has {world_size} rank(s), but parallel.tensor={tensor} x parallel.pipeline={pipeline} needs a "
            f"multiple of {replica}; start another number of ranks (torchrun --nproc-per-node) or change the layout"
        )
    data = world_size // replica
    widths = {
        "model.heads": heads,
        "model.kv_heads": kv_heads,
        "model.hidden": hidden,
        "the MLP width (model.ffn_hidden, or model.hidden x model.ffn_multiple)": mlp_width,
        "the padded vocabulary": padded_vocab_size,
    }
    common = math.gcd(*widths.values())
    for what, width in widths.items():
        _must_divide(what, width, "parallel.tensor", tensor, fitting=common)
    stages = "parallel.pipeline" if virtual == 1 else "parallel.pipeline x parallel.virtual_pipeline"
    _must_divide("model.layers", layers, stages, pipeline * virtual, fitting=layers)
    _must_divide(
        "batch.global_batch_size",
        global_batch_size,
        "batch.micro_batch_size x data-parallel ranks",
        micro_batch_size * data,
    )
    num_microbatches = global_batch_size // (micro_batch_size * data)
    _check_virtual_pipeline(pipeline, virtual, num_microbatches)
    _check_flags(parallel, seq_length)
    chunk_layers = layers // (pipeline * virtual)
    if parallel.recompute_layers is not None and parallel.recompute_layers > chunk_layers:
        raise ConfigError(
            f"parallel.recompute_layers is {parallel.recompute_layers}, but a model chunk has {chunk_layers} of the "
            f"{layers} blocks; set at most that, or leave it out for all"
        )
    return Layout(tensor, pipeline, virtual, data, num_microbatches)


def _must_divide(what: str, value: int, by: str, divisor: int, *, fitting: int | None = None) -> None:
    """Refuse a number that is not a multiple of a divisor.

    Args:
        what: name of the number.
        value: the number.
        by: name of the divisor.
        divisor: the divisor.
        fitting: number whose divisors are the values of `by` that would do; None to name numbers for `what` instead.

    Raises:
        ConfigError: it is no multiple.
    """
    if value % divisor:
        if fitting is not None:
            choices = [str(choice) for choice in range(1, fitting + 1) if fitting % choice == 0]
            shown = choices if len(choices) <= _MOST_CHOICES else [*choices[: _MOST_CHOICES - 1], choices[-1]]
            named = f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]
            raise ConfigError(f"{what} is {value}, which {by} = {divisor} does not divide; {by} of {named} would do")
        lower = value - value % divisor
        near = f"{lower} or {lower + divisor}" if lower else f"{lower + divisor}"
        raise ConfigError(f"{what} is {value}, which {by} = {divisor} does not divide; {what} of {near} would do")


def _check_virtual_pipeline(pipeline: int, virtual: int, num_microbatches: int) -> None:
    if virtual == 1:
        return
    if pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline is {virtual} but parallel.pipeline is 1; interleaving needs at least two stages"
        )
    if num_microbatches % pipeline:
        raise ConfigError(
            f"the interleaved schedule needs the microbatches per step ({num_microbatches}) to be a multiple of "
            f"parallel.pipeline = {pipeline}; change batch.global_batch_size or batch.micro_batch_size"
        )


def _check_flags(parallel: ParallelConfig, seq_length: int) -> None:
    if parallel.tp_comm_overlap and not parallel.sequence:
        raise ConfigError(
            "parallel.tp_comm_overlap is true but parallel.sequence is not; it needs sequence parallelism"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError("parallel.sequence is true but parallel.tensor is 1; sequence parallelism needs tensor > 1")
    if parallel.sequence:
        _must_divide("model.seq_length", seq_length, "parallel.tensor (with parallel.sequence)", parallel.tensor)
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather needs parallel.distributed_optimizer and parallel.overlap_grad_reduce to "
            "be true as well"
        )
