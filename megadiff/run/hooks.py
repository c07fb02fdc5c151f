"""The hooks and metric sinks of a run: those that every run has, built from their sections, and those of the list."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megadiff.data.baselines import Baselines
from megadiff.errors import ConfigError, StorageError
from megadiff.eval.drawn_text import DrawnText
from megadiff.eval.validation import ValidationEvaluator
from megadiff.methods import Method
from megadiff.model import cost
from megadiff.parallel.objective import ShardedObjective
from megadiff.parallel.pipeline import ModelChunk
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform
from megadiff.platform.stopwatch import stopwatch
from megadiff.run.context import RunContext
from megadiff.scaling.flops import FLOP_COUNTS
from megadiff.scaling.paired import FILE_NAME
from megadiff.train.goodput import Goodput
from megadiff.train.gradients import SequenceGradients
from megadiff.train.hooks import Hook, HookContext, MetricSinks
from megadiff.train.hooks._listed import build_listed
from megadiff.train.hooks.log import Console, LogHook
from megadiff.train.hooks.metrics_file import MetricsFile, PerSequenceFile
from megadiff.train.hooks.replicas import ReplicaCheck
from megadiff.train.hooks.stragglers import StragglerHook, shared_cores, time_computation
from megadiff.train.hooks.tensorboard import TensorBoard
from megadiff.train.hooks.validation import SampleHook, ValidationHook

log = logging.getLogger("megadiff")


def hook_context(
    prepared: RunContext,
    method: Method,
    *,
    first_step: int,
    chunks: Sequence[ModelChunk],
    wrapped: Sequence[Any],
    topology: Topology,
    platform: Platform,
) -> HookContext:
    """Return what the run's hooks may use, with `metrics.jsonl` and TensorBoard open on the main rank.

    Raises:
        StorageError: the run folder cannot be written.
    """
    config, sinks = prepared.config, MetricSinks()
    if topology.is_main:
        with _writing_to(config.folder):
            if config.log.tensorboard:
                sinks.add(TensorBoard(config.folder / "tensorboard", after_step=first_step))
            sinks.add(MetricsFile(config.folder / "metrics.jsonl", after_step=first_step))
    return HookContext(
        config=config,
        folder=config.folder,
        first_step=first_step,
        topology=topology,
        platform=platform,
        tokenizer=prepared.tokenizer,
        method=method,
        chunks=chunks,
        wrapped=wrapped,
        sinks=sinks,
        gradients=SequenceGradients(
            chunks=wrapped,
            objective=ShardedObjective(method, topology),
            batch=method.batch,
            train=prepared.data,
            validation=prepared.data.valid,
            topology=topology,
            device=platform.device,
            seq_length=config.model.seq_length,
            micro_batch_size=config.batch.micro_batch_size,
        ),
    )


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise ConfigError(
                f"{error.filename or folder} is a link or a folder, where the run writes a file; move it away"
            ) from None
        raise StorageError(
            f"the run folder {folder} cannot be written ({error.strerror or error}); free space there, or set "
            "output_dir to another disk"
        ) from None


def build_hooks(
    prepared: RunContext, context: HookContext, goodput: Goodput, baselines: Baselines | None
) -> list[Hook]:
    """Return the run's hooks in the order of their calls, without the one that saves. Collective over the world.

    Args:
        prepared: the run.
        context: what hooks may use; sinks of the list and the console are added to its sinks.
        goodput: account of where the run's time goes.
        baselines: what evaluation lines have for comparison; None without validation data and on other ranks.
    """
    config = prepared.config
    console = Console(config.steps, config.tokens_before)
    if context.topology.is_main:
        context.sinks.add(console)
    listed = build_listed(config.hooks, context)
    return [
        console,
        _log_hook(prepared, context, goodput),
        *_rank_checks(context),
        *_validation(prepared, context, goodput, baselines),
        *_samples(prepared, context, goodput),
        *listed,
    ]


def _log_hook(prepared: RunContext, context: HookContext, goodput: Goodput) -> LogHook:
    config = prepared.config
    log_snr_range = context.method.log_snr_range
    covered = None if log_snr_range is None else list(log_snr_range)
    return LogHook(
        every=config.log.every,
        steps=config.steps,
        tokens_before=config.tokens_before,
        flops_per_token=cost.matrix_flops_per_token(prepared.shape),
        flops_by_count={count: cost.flops_per_token(prepared.shape, count) for count in FLOP_COUNTS},
        executed_flops=prepared.executed_flops,
        world_size=prepared.layout.world_size,
        platform=context.platform,
        sinks=context.sinks,
        extras=[goodput.record, lambda: {"log_snr_range": covered}],
        epochs=prepared.epochs_after,
    )


def _rank_checks(context: HookContext) -> list[Hook]:
    """Return the hooks that compare ranks; none if there is one."""
    topology, platform, health = context.topology, context.platform, context.config.health
    world_size = topology.layout.world_size
    if world_size == 1:
        return []
    watch = stopwatch(platform)
    replicas = ReplicaCheck(health.check_replicas_every, context.chunks, context.wrapped, topology)
    found = topology.gather_to_main(shared_cores(platform, world_size=world_size))
    shared = topology.from_main(next((reason for reason in found or () if reason is not None), None))
    if shared is not None:  # one decision for all ranks, since looking for stragglers is collective
        log.info(f"stragglers        not looked for: {shared}")
        return [replicas]
    time_computation(context.wrapped, watch)
    return [StragglerHook(context.config.log.every, health.straggler_ratio, watch, topology, platform), replicas]


def _validation(
    prepared: RunContext, context: HookContext, goodput: Goodput, baselines: Baselines | None
) -> list[Hook]:
    """Return the hook that evaluates, its file of single sequences open; none without validation data."""
    config, topology = prepared.config, context.topology
    if not prepared.data.valid:
        return []
    evaluator = ValidationEvaluator(
        sources=prepared.data.valid,
        task=context.method.validation(num_noise_levels=config.eval.num_noise_levels),
        chunks=context.wrapped,
        topology=topology,
        device=context.platform.device,
        micro_batch_size=config.batch.micro_batch_size,
    )
    per_sequence: PerSequenceFile | None = None
    if topology.is_main:
        with _writing_to(config.folder):
            per_sequence = PerSequenceFile(config.folder / FILE_NAME, after_step=context.first_step)
        context.sinks.add(per_sequence)
    hook = ValidationHook(
        every=config.eval.every,
        at_steps=config.evaluation_steps,
        steps=config.steps,
        first_step=context.first_step,
        evaluate=evaluator,
        sinks=context.sinks,
        per_sequence=per_sequence,
        goodput=goodput,
        baselines=baselines.as_metrics() if baselines is not None else {},
    )
    return [hook]


def _samples(prepared: RunContext, context: HookContext, goodput: Goodput) -> list[Hook]:
    """Return the hook that samples text; none unless `eval.samples` is set."""
    config, bos = prepared.config, prepared.tokenizer.bos_id
    if not config.eval.samples:
        return []
    sample = DrawnText(
        sequences=config.eval.samples,
        steps=config.eval.sample_steps,
        seq_length=config.model.seq_length,
        sampler=context.method.sampler(),
        attention=context.method.prompted_attention,
        tokenizer=prepared.tokenizer,
        start=[bos] if prepared.data.prepended_bos and bos is not None else [],
        chunks=context.wrapped,
        topology=context.topology,
        device=context.platform.device,
    )
    hook = SampleHook(
        every=config.eval.every,
        at_steps=config.evaluation_steps,
        steps=config.steps,
        first_step=context.first_step,
        sample=sample,
        folder=context.folder if context.topology.is_main else None,
        goodput=goodput,
    )
    return [hook]
