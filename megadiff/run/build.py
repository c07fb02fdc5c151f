"""Assembly of a run from its configuration: the only module that constructs the parts and connects them.

`run` opens what surrounds the training, `build_trainer` builds the parts, and `build_hooks` the hooks and metric sinks:
those that every run has, from their sections, and those of the list.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megadiff.checkpoint.save import AsyncCheckpointer
from megadiff.data.baselines import Baselines
from megadiff.data.loader import DataShard, SequenceLoader
from megadiff.diffusion.noising import NoisedBatch
from megadiff.errors import ConfigError, StorageError
from megadiff.eval.validation import ValidationEvaluator
from megadiff.loss.fused_lm_head import choose_loss_kernel
from megadiff.methods import Method
from megadiff.model import cost
from megadiff.model.denoiser import Denoiser, build_chunks, gathered_weights, wrap_data_parallel
from megadiff.model.initialisation import global_parameters, initialise, role_of
from megadiff.model.kernels import describe_kernels, open_tensor_overlap
from megadiff.optim.optimizer import Optimizer, build_optimizer
from megadiff.parallel.objective import Objective, ShardedObjective
from megadiff.parallel.pipeline import ModelChunk, set_loss_reduction
from megadiff.parallel.step_metrics import work_of
from megadiff.parallel.topology import (
    Topology,
    is_main_process,
    open_topology,
    process_group,
    rank_from_environment,
    world_size_from_environment,
)
from megadiff.platform.machine import Platform, stopwatch
from megadiff.run.config import RunConfig
from megadiff.run.context import (
    RunContext,
    baselines_of,
    data_advice,
    data_facts,
    describe_baselines,
    describe_data,
    machine_for,
    validate_run,
)
from megadiff.run.folder import (
    StatusWriter,
    Supervision,
    goodput_of,
    log_to_console,
    run_folder,
    write_config,
    write_facts,
)
from megadiff.run.resume import ResumeOptions, ResumeState, manifest_of, resume
from megadiff.run.summary import description_advice, executed_flops, run_summary
from megadiff.scaling.flops import FLOP_COUNTS
from megadiff.scaling.paired import FILE_NAME
from megadiff.supervision.launch import Launch, end_with_launcher
from megadiff.supervision.stopping import StopRequest
from megadiff.supervision.watchdog import Watchdog
from megadiff.train.goodput import Goodput
from megadiff.train.gradients import SequenceGradients
from megadiff.train.health import Health, StepDecision
from megadiff.train.hooks import Hook, HookContext, MetricSinks, build_listed, restore, states
from megadiff.train.hooks.checkpoint import CheckpointHook
from megadiff.train.hooks.log import LOG_FIELDS, Console, LogHook
from megadiff.train.hooks.metrics_file import MetricsFile, PerSequenceFile
from megadiff.train.hooks.replicas import ReplicaCheck
from megadiff.train.hooks.stragglers import StragglerHook, shared_cores, time_computation
from megadiff.train.hooks.tensorboard import TensorBoard
from megadiff.train.hooks.validation import DrawnText, SampleHook, ValidationHook
from megadiff.train.loop import AgreedStop, Trainer, TrainStep

log = logging.getLogger("megadiff")

_PATIENCE_S = 60.0
"""Seconds for which a collective waits longer than the watchdog, whose report is the more precise one."""


def run(config: RunConfig, resume_options: ResumeOptions | None = None, *, before_s: float = 0.0) -> None:
    """Train the configured run, from the start or from its newest sound checkpoint, until the end or a stop request.

    Args:
        config: the run.
        resume_options: what the user allows when the run is resumed.
        before_s: seconds that the process has already spent on this run, in imports for example; counted in goodput.

    On a stop request the run saves a checkpoint and returns as it does after its last step; `status.json` records
    which of the two happened.
    """
    end_with_launcher()
    log_to_console()
    if resume_options is not None:
        resume_options.check(config)
    platform = machine_for(config)
    world_size = world_size_from_environment()
    prepared = validate_run(config, world_size=world_size)
    with ExitStack() as opened:
        opened.enter_context(run_folder(config))
        launch = Launch.from_env(config.folder, rank=rank_from_environment(), world_size=world_size)
        standing = StatusWriter(config, launch)
        watchdog = opened.enter_context(Watchdog(config.watchdog, launch))

        def failing(error: BaseException, step: int | None = None) -> None:
            standing.failing(prepared.shortage(error) or error, step)
            watchdog.failing(prepared.shortage(error) or error)

        try:
            stop = opened.enter_context(StopRequest(config.stop, config.folder, is_main=is_main_process()))
            supervision = Supervision(watchdog, stop, goodput_of(config, before_s=before_s), failing, standing.saved)
            with watchdog.section("setup"), supervision.goodput.during("setup"):
                opened.enter_context(process_group(platform, timeout_s=config.watchdog.longest_s + _PATIENCE_S))
                platform.prepare_megatron()
                trainer = build_trainer(prepared, platform, resume_options, supervision)
            if trainer.first_step >= config.steps:
                log.info(
                    f"{config.name} has already taken its {config.steps:,} steps: nothing is trained; to go on, set "
                    "schedule.steps above that, or give another run another `name`"
                )
            standing.running(trainer.first_step)
            standing.ended(trainer.train())
        except BaseException as error:
            failing(error)  # reported before leaving the process group, which may hang
            if (shortage := prepared.shortage(error)) is not None:
                raise shortage from error
            raise


def build_trainer(
    prepared: RunContext,
    platform: Platform,
    resume_options: ResumeOptions | None = None,
    supervision: Supervision | None = None,
) -> Trainer:
    """Build every part of the run on this rank and connect them. Collective over the world; the default group is open.

    Args:
        prepared: the run with its tokenizer, data and layout.
        platform: this rank's machine.
        resume_options: what the user allows if the run is resumed.
        supervision: the parts that look after the run; without them another program does.
    """
    config = prepared.config
    supervision = supervision or Supervision.none(config)
    topology = open_topology(prepared.layout, timeout_s=config.watchdog.longest_s + _PATIENCE_S)
    chunks, wrapped, optimizer = build_trainables(config, platform, topology, vocab_size=prepared.tokenizer.vocab_size)
    loss_kernel, method = build_loss(prepared, platform)
    _log_parts(prepared, platform, optimizer, loss_kernel)
    origin, prepared = resume(
        prepared, resume_options or ResumeOptions(), chunks, optimizer, topology=topology, platform=platform
    )
    health = Health(config.health, sizes=config.sizes)
    health.restore(origin.health)
    _log_and_write_data(prepared, origin, topology)
    context = hook_context(
        prepared, method, first_step=origin.step, chunks=chunks, wrapped=wrapped, topology=topology, platform=platform
    )
    loader = sequence_loader(prepared, method, topology, origin.step)
    baselines = baselines_of(prepared) if topology.is_main else None
    for line in describe_baselines(baselines):
        log.info(line)
    hooks = build_hooks(prepared, context, supervision.goodput, baselines)
    restore(hooks, origin.hooks)
    checkpoint = CheckpointHook(
        AsyncCheckpointer(
            config.folder,
            chunks,
            optimizer,
            keep=config.checkpoint.keep,
            before_cooldown=config.lr_schedule().decay_start,
            topology=topology,
            platform=platform,
        ),
        lambda step: manifest_of(prepared, origin, step, health=health.state(), hooks=states(hooks)),
        every=config.checkpoint.every,
        steps=config.steps,
        in_background=config.checkpoint.in_background,
        gathered=partial(gathered_weights, wrapped),
        sinks=context.sinks,
        goodput=supervision.goodput,
        completed=supervision.saved,
    )
    return Trainer(
        step=training_step(prepared, method, wrapped, optimizer, topology, platform, check=health.check),
        health=health,
        first_step=origin.step,
        steps=config.steps,
        sizes=config.sizes,
        sequences_at_once=config.batch.micro_batch_size * prepared.layout.data,
        schedule=config.lr_schedule(),
        peak_lr=config.optimizer.lr,
        microbatches=(microbatch.content for microbatch in loader),
        hooks=[*hooks, checkpoint],
        checkpoint=checkpoint,
        stop=AgreedStop(supervision.stop, topology),
        watchdog=supervision.watchdog,
        goodput=supervision.goodput,
        closing=[loader.close, context.sinks.close],
        failing=supervision.failing,
    )


def _log_parts(prepared: RunContext, platform: Platform, optimizer: Optimizer, loss_kernel: str) -> None:
    """Log the machine, the numbers that follow from the configuration, and which implementations were chosen."""
    config = prepared.config
    kernels = f"kernels           {describe_kernels(config.parallel, config.precision, platform)}"
    for line in [platform.describe(), kernels, *run_summary(config, prepared.layout, prepared.shape)]:
        log.info(line)
    log.info(f"optimizer         {config.optimizer.name}, {optimizer.kernel}")
    log.info(f"head              {loss_kernel}")
    log.info(f"log line          {LOG_FIELDS}")


def _log_and_write_data(prepared: RunContext, origin: ResumeState, topology: Topology) -> None:
    """Log the data at the position reached; the main rank also warns of likely mistakes and writes the run folder."""
    for line in describe_data(prepared, step=origin.step):
        log.info(line)
    if topology.is_main:
        if origin.step < prepared.config.steps:  # else nothing is trained, and the file stays that of what was
            write_config(prepared.config)
        doubts = data_advice(prepared)
        for doubt in doubts:
            log.warning(doubt)
        for doubt in description_advice(prepared.config):
            log.warning(doubt)
        write_facts(prepared.config, data_facts(prepared, step=origin.step, advice=doubts))


def build_loss(prepared: RunContext, platform: Platform) -> tuple[str, Method]:
    """Return the description of the loss kernel, which is chosen here alone, and the training method that uses it."""
    description, loss_kernel = choose_loss_kernel(prepared.config.objective.loss_kernel, is_cpu=platform.is_cpu)
    return description, prepared.method(loss_kernel)


def training_step(
    prepared: RunContext,
    objective: Objective,
    wrapped: Sequence[Any],
    optimizer: Optimizer,
    topology: Topology,
    platform: Platform,
    *,
    check: Callable[[float, float], StepDecision],
) -> TrainStep:
    """Return the optimizer step of this run; `check` decides on its update (`train.loop.TrainStep`)."""
    config = prepared.config
    return TrainStep(
        chunks=wrapped,
        optimizer=optimizer,
        objective=ShardedObjective(objective, topology),
        topology=topology,
        device=platform.device,
        seq_length=config.model.seq_length,
        micro_batch_size=config.batch.micro_batch_size,
        check=check,
    )


def build_trainables(
    config: RunConfig, platform: Platform, topology: Topology, *, vocab_size: int
) -> tuple[list[Denoiser], list[Any], Optimizer]:
    """Return model chunks with their first weights, their data-parallel wrappers, and the optimizer."""
    open_tensor_overlap(config.model, config.parallel, config.precision, micro_batch_size=config.batch.micro_batch_size)
    chunks = build_chunks(
        config.model,
        vocab_size=vocab_size,
        parallel=config.parallel,
        precision=config.precision,
        platform=platform,
        topology=topology,
    )
    if platform.has_values:
        initialise(chunks, config.model, seed=config.seed, topology=topology)
    wrapped = wrap_data_parallel(chunks, parallel=config.parallel, precision=config.precision)
    set_loss_reduction(wrapped, topology, mean=config.objective.reduction == "mean")
    optimizer = build_optimizer(
        wrapped,
        [(role_of(name), parameter) for chunk in chunks for name, parameter in global_parameters(chunk)],
        config.optimizer,
        scale=config.optimizer_scale,
        is_bf16=config.precision.compute == "bf16",
        master_weights=config.precision.master_weights,
        distributed=config.parallel.distributed_optimizer,
        platform=platform,
        topology=topology,
    )
    return chunks, wrapped, optimizer


def sequence_loader(
    prepared: RunContext, method: Method, topology: Topology, first_step: int
) -> SequenceLoader[NoisedBatch]:
    """Return this data-parallel rank's microbatches, as the method makes them, from `first_step` on."""
    config = prepared.config
    batch = config.batch
    return SequenceLoader(
        prepared.data,
        method.batch,
        sizes=config.sizes,
        shard=DataShard(batch.micro_batch_size, dp_rank=topology.data_rank, dp_size=topology.layout.data),
        first_step=first_step,
        predicted=prepared.data.predicted,
        documents=prepared.data.documents,
    )


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
    config, sizes, data = prepared.config, prepared.config.sizes, prepared.data
    flops_of = executed_flops(config, prepared.shape)
    log_snr_range = context.method.log_snr_range
    covered = None if log_snr_range is None else list(log_snr_range)
    return LogHook(
        every=config.log.every,
        steps=config.steps,
        tokens_before=config.tokens_before,
        flops_per_token=cost.matrix_flops_per_token(prepared.shape),
        flops_by_count={count: cost.flops_per_token(prepared.shape, count) for count in FLOP_COUNTS},
        executed_flops=lambda sums: flops_of(**work_of(sums)._asdict()),
        world_size=prepared.layout.world_size,
        platform=context.platform,
        sinks=context.sinks,
        extras=[goodput.record, lambda: {"log_snr_range": covered}],
        epochs=lambda step: data.epochs_at(sizes.samples_before(step)),
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
