"""The numbers that follow from a run's configuration, reported before training starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

from megadiff.errors import ConfigError, ShortageError
from megadiff.methods import method_advice
from megadiff.model import cost
from megadiff.optim.config import effective
from megadiff.optim.members import load_member
from megadiff.parallel.config import Layout
from megadiff.run.config import RunConfig
from megadiff.scaling.flops import FLOP_COUNTS

_ROLE_NAMES = {
    "hidden": "block matrices",
    "embedding": "embedding",
    "head": "output head",
    "norm": "norm gains",
    "bias": "biases",
}


class NoLayoutError(ConfigError):
    """A run that does not fit on a number of ranks; carries the sizes that do not depend on that number."""

    def __init__(self, message: str, sizes: list[str]) -> None:
        super().__init__(message)
        self.sizes = sizes
        """Lines of `describe` that need no layout."""


def run_summary(config: RunConfig, layout: Layout, shape: cost.Shape) -> list[str]:
    """Return the derived numbers, one per line."""
    memory = memory_per_rank(config, layout, shape)
    chunks = f" ({layout.virtual_pipeline} chunks each)" if layout.virtual_pipeline > 1 else ""
    return [
        *describe_sizes(config, shape),
        f"layout            {layout.world_size} rank(s): tensor {layout.tensor} x pipeline {layout.pipeline}{chunks} "
        f"x data {layout.data}",
        f"tokens per step   {config.tokens_per_step:,} ({config.batch.global_batch_size} sequences of "
        f"{config.model.seq_length}, {layout.num_microbatches} microbatch(es) of {config.batch.micro_batch_size} per "
        f"replica){f', from {config.batch.rampup.start} sequences up' if config.batch.rampup else ''}",
        f"run               {config.steps:,} steps, {config.tokens_before(config.steps):,} tokens",
        *evaluation_times(config),
        *learning_rates(config, cost.parameters(shape)),
        f"bytes per rank    {gib(memory.total)}: parameters {gib(memory.parameters)}, gradients "
        f"{gib(memory.gradients)}, optimizer {gib(memory.optimizer)}, activations {gib(memory.activations)}, "
        f"logits {gib(memory.logits)} (estimate for "
        f"{'Transformer Engine' if has_fused_layers(config) else 'local'} layers)",
    ]


def describe_sizes(config: RunConfig, shape: cost.Shape) -> list[str]:
    """Return the derived numbers that are the same for every layout, one per line."""
    entries = config.model.padded_vocab_size(shape.vocab_size)
    counted = cost.parameters(shape)
    return [
        f"parameters        {counted.total:,} ({counted.non_embedding:,} without embedding and head; "
        f"{cost.paper_parameters(shape):,} as the paper counts)",
        f"vocabulary        {shape.vocab_size:,} ids with the mask, padded to {entries:,} entries",
        f"FLOPs per token   {', '.join(f'{count} {cost.flops_per_token(shape, count):.5g}' for count in FLOP_COUNTS)}",
    ]


def evaluation_times(config: RunConfig) -> list[str]:
    """Return the line about the evaluations at named steps and budgets; none unless there are some."""
    budgets = {flops: config.step_of_flops(flops) for flops in config.eval.at_flops}
    reasons = {step: [f"{flops:g} FLOPs" for flops, at in budgets.items() if at == step] for step in budgets.values()}
    if not config.evaluation_steps:
        return []
    named = [
        f"{step:,} ({', '.join(reasons[step])})" if step in reasons else f"{step:,}"
        for step in sorted(config.evaluation_steps)
    ]
    return [f"evaluation        also at step(s) {_first(named)}"]


def description_advice(config: RunConfig) -> list[str]:
    """Return warnings about likely mistakes in a run's description, for which no data need be read."""
    return [*evaluation_advice(config), *method_advice(config)]


def evaluation_advice(config: RunConfig) -> list[str]:
    """Return a warning about evaluations at named steps inside the warm-up; none if there are none there."""
    warmup = config.schedule.warmup_steps
    early = [f"{step:,}" for step in sorted(config.evaluation_steps) if step <= warmup]
    if not early:
        return []
    return [
        f"eval.at_steps and eval.at_flops name step(s) {_first(early)}, inside the learning rate's warm-up of "
        f"{warmup:,} steps: such a loss is not that of its budget, and fits of scaling laws count nothing before "
        f"3 x warm-up (step {3 * warmup:,})"
    ]


def _first(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def lay_out_run(config: RunConfig, *, world_size: int, vocab_size: int) -> Layout:
    """Return the run's layout on `world_size` ranks.

    Raises:
        NoLayoutError: it does not fit; the message names the first rule that is violated, and the numbers that fit.
    """
    try:
        return config.layout(world_size=world_size, vocab_size=vocab_size)
    except ConfigError as error:
        fitting = fitting_ranks(config, vocab_size=vocab_size)
        replica = config.parallel.ranks_per_replica
        if not fitting and world_size != replica:  # the mistake is independent of the ranks: report it for one replica
            return lay_out_run(config, world_size=replica, vocab_size=vocab_size)
        numbers = ", ".join(map(str, fitting))
        ways = (
            f"numbers of ranks that fit: {numbers} (--check --ranks {fitting[0]})"
            if fitting
            else "this holds for every number of ranks"
        )
        sizes = describe_sizes(config, config.shape(vocab_size=vocab_size))
        raise NoLayoutError(f"{error}; {ways}", sizes) from error


def fitting_ranks(config: RunConfig, *, vocab_size: int, count: int = 6) -> list[int]:
    """Return the smallest numbers of ranks, at most `count` of them, on which the run can be laid out."""
    found: list[int] = []
    replica = config.parallel.ranks_per_replica
    most = config.batch.global_batch_size // config.batch.micro_batch_size
    for replicas in range(1, most + 1):
        if config.batch.global_batch_size % (replicas * config.batch.micro_batch_size):
            continue  # skip early: the batch does not divide by this number of replicas
        ranks = replicas * replica
        try:
            config.layout(world_size=ranks, vocab_size=vocab_size)
        except ConfigError:
            continue
        found.append(ranks)
        if len(found) == count:
            break
    return found


def ranks_to_check(config: RunConfig, wanted: int | None, *, launched: int | None) -> tuple[int, list[str]]:
    """Return the number of ranks on which `--check` lays the run out, with a remark if nobody specified it."""
    given = wanted or launched
    if given is not None:
        return given, []
    fitting = fitting_ranks(config, vocab_size=config.data.vocab_size or 2)
    fewest = fitting[0] if fitting else config.parallel.ranks_per_replica
    others = f"; {', '.join(map(str, fitting[1:]))} fit too" if fitting[1:] else ""
    return fewest, [f"ranks             {fewest}, the fewest that fit; --ranks N lays the run out on N{others}"]


def executed_flops(config: RunConfig, shape: cost.Shape) -> Callable[..., float]:
    """Return a function from the counts of `parallel.step_metrics.Work` to the FLOPs executed for them, over all ranks
    (`cost.executed_flops`)."""
    chunks = config.parallel.pipeline * config.parallel.virtual_pipeline
    return partial(
        cost.executed_flops,
        shape,
        vocab_entries=config.model.padded_vocab_size(shape.vocab_size),
        recompute_layers=_fully_recomputed(config) * chunks,
        recompute_modules=config.parallel.recomputed_modules,
    )


def learning_rates(config: RunConfig, counted: cost.Parameters) -> list[str]:
    """Return a line for each parameter role in the model: the number of parameters, and how they are updated.

    Args:
        config: the run.
        counted: its parameters by role.
    """
    counts = {
        "hidden": counted.hidden_matrices,
        "embedding": counted.embedding,
        "head": counted.head,
        "norm": counted.norms,
        "bias": counted.biases + counted.sink,
    }
    base, lines = config.optimizer.lr, []
    for found in effective(config.optimizer, config.optimizer_scale, load_member(config.optimizer.name)):
        if not counts[found.role]:
            continue
        used = [f"eps {found.eps:.3g}"] if found.eps else []
        used += [f"{name} {str(value).lower()}" for name, value in found.own.items()]
        source = f"{base:g} x {found.factor}" if found.factor else "optimizer.lr"
        lines.append(
            f"learning rate     {_ROLE_NAMES[found.role]}, {counts[found.role]:,} parameters: peak {found.lr:.4g} "
            f"({source}), weight decay {found.weight_decay:.4g}{''.join(f', {part}' for part in used)}"
        )
    if config.optimizer.parametrisation == "completep":
        lines.append(
            "learning rate     optimizer.lr is CompleteP's base rate, not comparable with rates of other trainers: "
            f"for block matrices to learn at r, set it to {config.model.hidden} r"
        )
    return lines


def memory_per_rank(config: RunConfig, layout: Layout, shape: cost.Shape) -> cost.Memory:
    """Return the estimated bytes on the rank that needs most."""
    entries = config.model.padded_vocab_size(shape.vocab_size)
    return cost.bytes_per_rank(shape, _cost_layout(config, layout), _cost_precision(config), vocab_entries=entries)


def memory_of_stage(config: RunConfig, layout: Layout, shape: cost.Shape, *, stage: int) -> cost.Memory:
    """Return the estimated bytes on one pipeline stage's ranks."""
    entries = config.model.padded_vocab_size(shape.vocab_size)
    counted = _cost_layout(config, layout), _cost_precision(config)
    return cost.stage_memory(shape, *counted, stage=stage, vocab_entries=entries)


def memory_shortage(error: BaseException, config: RunConfig, layout: Layout, shape: cost.Shape) -> ShortageError | None:
    """Return the error to raise instead of a failed allocation on device or host; None for any other error.

    Out-of-memory errors are recognised by torch's wording, so that torch need not be imported here.
    """
    text, on_host = str(error), "can't allocate memory"
    is_short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not is_short and on_host not in text:
        return None
    message = ". ".join(text[max(0, text.find(on_host)) :].split(". ")[:2]).strip(" .")
    now = config.parallel
    cut = "" if now.distributed_optimizer else ", set parallel.distributed_optimizer=true"
    return ShortageError(
        f"out of memory ({message or type(error).__name__}); the estimate for this layout is "
        f"{gib(memory_per_rank(config, layout, shape).total)} a rank: lower batch.micro_batch_size "
        f"({config.batch.micro_batch_size}), raise parallel.tensor ({now.tensor}) or parallel.pipeline ({now.pipeline})"
        f"{cut}, or take more memory; `megadiff doctor` shows which of these would fit"
    )


def checkpoint_bytes(config: RunConfig, shape: cost.Shape) -> int:
    """Return the estimated bytes of one checkpoint, for any layout: weights and optimizer state, once each."""
    entries = config.model.padded_vocab_size(shape.vocab_size)
    precision = replace(_cost_precision(config), fp8="none")
    whole = cost.bytes_per_rank(shape, cost.Layout(), precision, vocab_entries=entries)
    return whole.parameters + whole.optimizer


def _cost_layout(config: RunConfig, layout: Layout) -> cost.Layout:
    return cost.Layout(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        data=layout.data,
        num_microbatches=layout.num_microbatches,
        sequence=config.parallel.sequence,
        micro_batch_size=config.batch.micro_batch_size,
        distributed_optimizer=config.parallel.distributed_optimizer,
        fused_loss=config.objective.loss_kernel != "plain",
        recompute_layers=_fully_recomputed(config),
        recompute_modules=config.parallel.recomputed_modules,
        fused_layers=has_fused_layers(config),
    )


def has_fused_layers(config: RunConfig) -> bool:
    """Return whether the layers will be Transformer Engine's, as far as is known before the device is opened."""
    if config.precision.compute != "bf16" or config.platform == "cpu" or config.transformer_impl == "local":
        return False
    is_wanted = config.transformer_impl == "transformer_engine" or config.precision.fp8 != "none"
    return is_wanted or find_spec("transformer_engine") is not None


def _fully_recomputed(config: RunConfig) -> int:
    """Return the number of blocks per model chunk that keep only their input and recompute the rest."""
    parallel = config.parallel
    if parallel.recompute != "full":
        return 0
    return parallel.recompute_layers or config.model.layers // (parallel.pipeline * parallel.virtual_pipeline)


def _cost_precision(config: RunConfig) -> cost.Precision:
    compute = config.precision.compute
    masters = compute == "bf16" and config.precision.master_weights
    member = load_member(config.optimizer.name)
    return cost.Precision(
        params=compute,
        compute=compute,
        master_weights=masters,
        fp32_gradients=masters or compute == "fp32",
        moments=len(member.state_keys),
        role_moments={role: len(keys) for role, keys in member.role_state_keys.items()},
        fp8=config.precision.fp8,
        bf16_ends=config.precision.fp8_first_last_bf16,
    )


def gib(count: float) -> str:
    """Return bytes in GiB, with three digits."""
    return f"{count / 2**30:.3g} GiB"
