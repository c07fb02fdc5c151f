"""From a run description to a wired run: the only place that constructs and connects the parts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import megadiff
from megadiff.checkpoint import store
from megadiff.checkpoint.manifest import FORMAT, Manifest, check_same_run, read_manifest
from megadiff.config.load import dump_config
from megadiff.data.batch_sizes import StepBatch
from megadiff.data.loader import RowLoader, Share
from megadiff.data.open import OpenData, open_data
from megadiff.data.tokenizer_files import load_tokenizer
from megadiff.data.tokenizers import Tokenizer
from megadiff.derived import describe
from megadiff.diffusion.mixing import mixing_from
from megadiff.diffusion.mixing_base import Mixing
from megadiff.diffusion.next_token import next_token_rows, start_id
from megadiff.diffusion.noising import NoisedRows, noise_rows
from megadiff.diffusion.snr import rate_from
from megadiff.errors import CheckpointError, ConfigError, DataError
from megadiff.eval.held_out import HeldOut, diffusion_bound, next_token_likelihood
from megadiff.model import cost
from megadiff.model.denoiser import Denoiser, build_chunks, gathered_weights, wrap_data_parallel
from megadiff.model.initialisation import initialise, role_of
from megadiff.optim.groups import Scale
from megadiff.optim.optimizer import Optimizer, build_optimizer
from megadiff.parallel.config import Layout
from megadiff.parallel.pipeline import configure_reduction
from megadiff.parallel.row_objective import DiffusionObjective, NextTokenObjective, RowObjective
from megadiff.parallel.topology import (
    Topology,
    open_topology,
    process_group,
    world_size_from_environment,
)
from megadiff.platform.machine import Platform, detect
from megadiff.run_config import RunConfig
from megadiff.run_folder import log_to_console, run_folder, write_config
from megadiff.train import hooks
from megadiff.train.loop import Run, train
from megadiff.train.metrics import MetricsFile
from megadiff.train.step import Step

log = logging.getLogger("megadiff")


@dataclass(frozen=True)
class Prepared:
    """All of a run that can be known, and refused, before any process group exists."""

    config: RunConfig
    tokenizer: Tokenizer
    data: OpenData
    layout: Layout

    @property
    def shape(self) -> cost.Shape:
        """The model's size for closed-form costs."""
        return self.config.shape(vocab_size=self.tokenizer.vocab_size)


def prepare(config: RunConfig, *, world_size: int) -> Prepared:
    """Open tokenizer and data and check the layout.

    Raises:
        ConfigError, DataError: what cannot be, in one sentence.
    """
    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
    except DataError as error:
        raise DataError(f"data.tokenizer: {error}") from error
    if config.data.vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(
            f"data.vocab_size is {config.data.vocab_size}, but the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} ids with its mask; set it to that or leave it out"
        )
    layout = config.layout(world_size=world_size, vocab_size=tokenizer.vocab_size)
    data = open_data(
        config.data, tokenizer, seq_length=config.model.seq_length, seed=config.seed, valid_rows=config.eval.rows
    )
    return Prepared(config, tokenizer, data, layout)


def check(config: RunConfig, *, ranks: int | None = None) -> str:
    """What `--check` prints: the resolved tree and the numbers that follow from it.

    With `data.vocab_size` the numbers come out before tokenizer and data exist; what is missing is said.
    """
    world_size = ranks or world_size_from_environment()
    try:
        prepared = prepare(config, world_size=world_size)
        lines = describe(config, prepared.layout, prepared.shape) + _describe_data(prepared)
    except DataError as error:
        if config.data.vocab_size is None:
            raise
        layout = config.layout(world_size=world_size, vocab_size=config.data.vocab_size)
        lines = describe(config, layout, config.shape(vocab_size=config.data.vocab_size))
        lines.append(f"not there yet     {error}")
    return dump_config(config) + "\n" + "\n".join(lines)


def _describe_data(prepared: Prepared) -> list[str]:
    trained, held = prepared.config.tokens_before(prepared.config.steps), prepared.data.train_tokens
    return [
        f"tokenizer         {prepared.tokenizer.name}, mask id {prepared.tokenizer.mask_id}",
        f"data              {held:,} tokens to train on: {trained / held:.2f} epochs",
    ]


def run(config: RunConfig) -> None:
    """Train as `config` says, from the start or from the run folder's last complete checkpoint."""
    log_to_console()
    platform = detect(config.platform)
    prepared = prepare(config, world_size=world_size_from_environment())
    with run_folder(config), process_group(platform):
        platform.prepare_megatron()
        train(wire(prepared, platform))


def wire(prepared: Prepared, platform: Platform) -> Run:
    """Build every part on this rank and connect them. Collective over the world; the default group is open."""
    config = prepared.config
    topology = open_topology(prepared.layout)
    chunks, wrapped, optimizer = _build_trainables(prepared, platform, topology)
    if topology.is_main:
        derived = [*describe(config, prepared.layout, prepared.shape), *_describe_data(prepared)]
        for line in (platform.describe(), *derived, f"optimizer         {config.optimizer.name}, {optimizer.kernel}"):
            log.info(line)
    first_step = _resume(prepared, chunks, optimizer, topology=topology, platform=platform)
    mixing = mixing_from(config.noise, vocab_size=prepared.tokenizer.vocab_size, mask_id=prepared.tokenizer.mask_id)
    objective: RowObjective = NextTokenObjective(mixing, topology)
    if not config.is_autoregressive:
        objective = DiffusionObjective(mixing, topology, rate_from(config.noise), config.objective)
    if topology.is_main:
        write_config(config)
    files = _open_files(config, first_step, topology)
    loader = _loader(prepared, mixing, topology, first_step)
    log_hook = hooks.Log(
        every=config.log.every,
        steps=config.steps,
        tokens_before=config.tokens_before,
        flops_per_token=cost.training_flops_per_token(prepared.shape),
        topology=topology,
        platform=platform,
        metrics=files.metrics,
        tensorboard=files.tensorboard,
    )
    evaluate = _evaluation(prepared, mixing, wrapped, topology, platform, files)
    save = partial(_save, prepared, chunks, wrapped, optimizer, topology, platform)

    def before() -> None:
        if evaluate is not None and first_step == 0:
            evaluate.run(0)

    def close() -> None:
        loader.close()
        files.close()

    return Run(
        step=Step(
            chunks=wrapped,
            optimizer=optimizer,
            loss=objective.loss,
            topology=topology,
            device=platform.device,
            seq_length=config.model.seq_length,
            micro_sequences=config.batch.micro_sequences,
            is_causal_prompt=config.is_causal_prompt,
        ),
        first_step=first_step,
        steps=config.steps,
        sizes=config.sizes,
        rows_at_once=config.batch.micro_sequences * prepared.layout.data,
        schedule=config.lr_schedule(),
        peak_lr=config.optimizer.lr,
        rows=(microbatch.content for microbatch in loader),
        hooks=[
            log_hook,
            *([evaluate] if evaluate is not None else []),
            hooks.Save(config.checkpoint.every, config.steps, save, files.metrics),
        ],
        before=before,
        close=close,
    )


def _build_trainables(
    prepared: Prepared, platform: Platform, topology: Topology
) -> tuple[list[Denoiser], list[Any], Optimizer]:
    """Model chunks with their first weights, their data-parallel wrappers, and the optimizer."""
    config = prepared.config
    chunks = build_chunks(
        config.model,
        vocab_size=prepared.tokenizer.vocab_size,
        parallel=config.parallel,
        precision=config.precision,
        platform=platform,
        topology=topology,
    )
    initialise(chunks, config.model, seed=config.seed, topology=topology)
    wrapped = wrap_data_parallel(chunks, parallel=config.parallel, precision=config.precision)
    configure_reduction(wrapped, mean=config.objective.reduction == "mean")
    optimizer = build_optimizer(
        wrapped,
        [(role_of(name), parameter) for chunk in chunks for name, parameter in chunk.named_parameters()],
        config.optimizer,
        scale=Scale(
            hidden=config.model.hidden,
            layers=config.model.layers,
            tokens_per_step=config.tokens_per_step,
            reduction=config.objective.reduction,
        ),
        is_bf16=config.precision.compute == "bf16",
        master_weights=config.precision.master_weights,
        distributed=config.parallel.distributed_optimizer,
        platform=platform,
        topology=topology,
    )
    return chunks, wrapped, optimizer


@dataclass(frozen=True)
class _Files:
    """What the main rank writes to while training; None on the others."""

    metrics: MetricsFile | None
    tensorboard: Any

    def close(self) -> None:
        for file in (self.metrics, self.tensorboard):
            if file is not None:
                file.close()


def _open_files(config: RunConfig, first_step: int, topology: Topology) -> _Files:
    if not topology.is_main:
        return _Files(None, None)
    board = None
    if config.log.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(config.folder / "tensorboard"), purge_step=first_step + 1)
    return _Files(MetricsFile(config.folder / "metrics.jsonl", after_step=first_step), board)


def _loader(prepared: Prepared, mixing: Mixing, topology: Topology, first_step: int) -> RowLoader[NoisedRows]:
    config = prepared.config
    batch = config.batch

    def noise(clean: npt.NDArray[np.int64], samples: list[int], step_batch: StepBatch) -> NoisedRows:
        if config.is_autoregressive:
            return next_token_rows(clean, start_id=start_id(prepared.tokenizer))
        return noise_rows(
            clean,
            seed=config.seed,
            sample_index=samples,
            mixing=mixing,
            rate=rate_from(config.noise),
            conditioning=config.conditioning,
            stratified=config.objective.stratified,
            global_batch=step_batch.sequences,
            batch_origin=step_batch.first_sample,
            pad_id=prepared.tokenizer.pad_id,
        )

    return RowLoader(
        prepared.data.train,
        noise,
        sizes=config.sizes,
        share=Share(batch.micro_sequences, dp_rank=topology.data_rank, dp_size=topology.layout.data),
        first_step=first_step,
    )


def _evaluation(
    prepared: Prepared,
    mixing: Mixing,
    chunks: Sequence[Any],
    topology: Topology,
    platform: Platform,
    files: _Files,
) -> hooks.Evaluate | None:
    config = prepared.config
    if not prepared.data.valid:
        return None
    measure = next_token_likelihood(mixing, start_id=start_id(prepared.tokenizer), topology=topology)
    if not config.is_autoregressive:
        measure = diffusion_bound(
            mixing, rate=rate_from(config.noise), topology=topology, noise_levels=config.eval.noise_levels
        )
    held_out = HeldOut(
        sources=prepared.data.valid,
        measure=measure,
        chunks=chunks,
        topology=topology,
        device=platform.device,
        micro_sequences=config.batch.micro_sequences,
    )
    return hooks.Evaluate(config.eval.every, config.steps, held_out, files.metrics, files.tensorboard)


def _resume(prepared: Prepared, chunks: Any, optimizer: Any, *, topology: Topology, platform: Platform) -> int:
    """Load the run's newest complete checkpoint, or the one it branches from; returns the steps that one has taken."""
    config = prepared.config
    folder = store.newest_complete(config.folder) if topology.is_main else None
    folder = topology.from_main(folder)
    if topology.is_main and (skipped := store.damaged(config.folder)):
        log.warning(f"damaged checkpoints, not used: {', '.join(str(path) for path in skipped)}")
    if folder is None and config.checkpoint.start_from is None:
        return 0
    folder = folder or Path(config.checkpoint.start_from or "")
    saved = read_manifest(folder)
    check_same_run(saved, _manifest(prepared, saved.step), folder)
    if saved.step > config.steps:
        raise CheckpointError(
            f"{folder} was saved after step {saved.step}, but this run ends after step {config.steps}; set "
            "schedule.steps above that, or begin from an earlier checkpoint"
        )
    store.load(folder, chunks, optimizer, topology=topology, platform=platform)
    if topology.is_main:
        log.info(f"going on from {folder} after step {saved.step} of {config.steps}")
    return saved.step


def _save(
    prepared: Prepared, chunks: Any, wrapped: Any, optimizer: Any, topology: Topology, platform: Platform, step: int
) -> Path:
    run_folder = prepared.config.folder
    with gathered_weights(wrapped):
        folder = store.save(
            run_folder, _manifest(prepared, step), chunks, optimizer, topology=topology, platform=platform
        )
    if topology.is_main:
        store.prune(run_folder, keep=prepared.config.checkpoint.keep)
    return folder


def _manifest(prepared: Prepared, step: int) -> Manifest:
    config, layout = prepared.config, prepared.layout
    samples = config.sizes.samples_before(step)
    return Manifest(
        format=FORMAT,
        step=step,
        samples=samples,
        tokens=samples * config.model.seq_length,
        config=config.model_dump(mode="json"),
        vocab_size=prepared.tokenizer.vocab_size,
        mask_id=prepared.tokenizer.mask_id,
        tokenizer_fingerprint=prepared.tokenizer.fingerprint,
        data_fingerprint=prepared.data.fingerprint,
        layout={
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual_pipeline": layout.virtual_pipeline,
            "data": layout.data,
        },
        versions={
            "megadiff": megadiff.__version__,
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
    )
