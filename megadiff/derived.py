"""The numbers that follow from a run description, said before anything is trained."""

from __future__ import annotations

from dataclasses import replace

from megadiff.errors import ShortageError
from megadiff.model import cost
from megadiff.optim.rules import effective
from megadiff.parallel.config import Layout
from megadiff.run_config import RunConfig


def describe(config: RunConfig, layout: Layout, shape: cost.Shape) -> list[str]:
    """The derived numbers, a line each."""
    rows = config.model.padded_vocab_size(shape.vocab_size)
    counted = cost.parameters(shape)
    memory = memory_per_rank(config, layout, shape)
    tokens = config.tokens_per_step
    chunks = f" ({layout.virtual_pipeline} chunks each)" if layout.virtual_pipeline > 1 else ""
    return [
        f"parameters        {counted.total:,} ({counted.non_embedding:,} without embedding and head; "
        f"{cost.paper_parameters(shape):,} as the paper counts)",
        f"vocabulary        {shape.vocab_size:,} ids with the mask, padded to {rows:,} rows",
        f"FLOPs per token   {cost.training_flops_per_token(shape):.5g} in full, "
        f"{cost.paper_flops_per_token(shape):.5g} by 6P + 12LdS (no embedding, no head)",
        f"layout            {layout.world_size} rank(s): tensor {layout.tensor} x pipeline {layout.pipeline}{chunks} "
        f"x data {layout.data}",
        f"tokens per step   {tokens:,} ({config.batch.global_sequences} rows of {config.model.seq_length}, "
        f"{layout.num_microbatches} microbatch(es) of {config.batch.micro_sequences} per replica)"
        f"{f', from {config.batch.ramp.start} rows up' if config.batch.ramp else ''}",
        f"run               {config.steps:,} steps, {config.tokens_before(config.steps):,} tokens",
        *learning_rates(config, counted),
        f"bytes per rank    {_gib(memory.total)}: parameters {_gib(memory.parameters)}, gradients "
        f"{_gib(memory.gradients)}, optimizer {_gib(memory.optimizer)}, activations {_gib(memory.activations)}, "
        f"logits {_gib(memory.logits)} (estimate)",
    ]


_ROLE_NAMES = {
    "bulk": "block matrices",
    "embedding": "embedding",
    "head": "output head",
    "norm": "norm gains",
    "bias": "biases",
}


def learning_rates(config: RunConfig, counted: cost.Parameters) -> list[str]:
    """Return a line for each role that the model has parameters of: how many, and what updates them.

    Args:
        config: the run.
        counted: its parameters by role.
    """
    counts = {
        "bulk": counted.bulk,
        "embedding": counted.embedding,
        "head": counted.head,
        "norm": counted.norms,
        "bias": counted.biases + counted.sink,
    }
    base, lines = config.optimizer.lr, []
    for found in effective(config.optimizer, config.optimizer_scale):
        if not counts[found.role]:
            continue
        source = f"{base:g} x {found.factor}" if found.factor else "optimizer.lr"
        lines.append(
            f"learning rate     {_ROLE_NAMES[found.role]}, {counts[found.role]:,} parameters: peak {found.lr:.4g} "
            f"({source}), weight decay {found.weight_decay:.4g}, eps {found.eps:.3g}"
        )
    if config.optimizer.parametrisation == "completep":
        lines.append(
            "learning rate     optimizer.lr is CompleteP's base rate, not comparable with rates of other trainers: "
            f"for block matrices to learn at r, set it to {config.model.hidden} r"
        )
    return lines


def memory_per_rank(config: RunConfig, layout: Layout, shape: cost.Shape) -> cost.Memory:
    """Estimated bytes on the fullest rank."""
    rows = config.model.padded_vocab_size(shape.vocab_size)
    return cost.bytes_per_rank(shape, _cost_layout(config, layout), _cost_precision(config), vocab_rows=rows)


def memory_shortage(error: BaseException, config: RunConfig, layout: Layout, shape: cost.Shape) -> ShortageError | None:
    """What to say in place of an allocation that failed, on a device or on the host; None if `error` is another.

    Known by torch's words, so that nothing here imports it.
    """
    text, on_host = str(error), "can't allocate memory"
    is_short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not is_short and on_host not in text:
        return None
    told = ". ".join(text[max(0, text.find(on_host)) :].split(". ")[:2]).strip(" .")
    now = config.parallel
    cut = "" if now.distributed_optimizer else ", set parallel.distributed_optimizer=true"
    return ShortageError(
        f"out of memory ({told or type(error).__name__}); the estimate for this layout is "
        f"{_gib(memory_per_rank(config, layout, shape).total)} a rank: lower batch.micro_sequences "
        f"({config.batch.micro_sequences}), raise parallel.tensor ({now.tensor}) or parallel.pipeline ({now.pipeline})"
        f"{cut}, or take more memory; tools/doctor.py says which of these would fit"
    )


def checkpoint_bytes(config: RunConfig, shape: cost.Shape) -> int:
    """Estimated bytes of one checkpoint, whatever the layout: weights and optimizer state, once each."""
    rows = config.model.padded_vocab_size(shape.vocab_size)
    precision = replace(_cost_precision(config), fp8=False)
    whole = cost.bytes_per_rank(shape, cost.Layout(), precision, vocab_rows=rows)
    return whole.parameters + whole.optimizer


def _cost_layout(config: RunConfig, layout: Layout) -> cost.Layout:
    return cost.Layout(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        data=layout.data,
        sequence=config.parallel.sequence,
        micro_sequences=config.batch.micro_sequences,
        distributed_optimizer=config.parallel.distributed_optimizer,
        fused_loss=config.objective.head != "plain",
        recompute_layers=_fully_recomputed(config),
        recompute_modules=config.parallel.recomputed_modules,
    )


def _fully_recomputed(config: RunConfig) -> int:
    """Blocks of each model chunk of which only the input is kept."""
    parallel = config.parallel
    if parallel.recompute != "full":
        return 0
    return parallel.recompute_layers or config.model.layers // (parallel.pipeline * parallel.virtual_pipeline)


def _cost_precision(config: RunConfig) -> cost.Precision:
    compute = config.precision.compute
    masters = compute == "bf16" and config.precision.master_weights
    return cost.Precision(
        params=compute,
        compute=compute,
        master_weights=masters,
        fp32_gradients=masters or compute == "fp32",
        fp8=config.precision.fp8 != "none",
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"
