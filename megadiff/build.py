"""From a run description to a wired run: the only place that constructs and connects the parts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout

import megadiff
from megadiff.checkpoint import store
from megadiff.checkpoint.manifest import FORMAT, Manifest, check_same_run, read_manifest
from megadiff.config.load import dump_config
from megadiff.data.loader import GlobalBatch, RowLoader
from megadiff.data.open import OpenData, open_data
from megadiff.data.tokenizer_files import load_tokenizer
from megadiff.data.tokenizers import Tokenizer
from megadiff.diffusion.mixing import HybridMixing, mixing_from
from megadiff.diffusion.noising import NoisedRows, noise_rows
from megadiff.diffusion.snr import rate_from
from megadiff.errors import ConfigError
from megadiff.eval.held_out import HeldOut, held_out_objective
from megadiff.model import cost
from megadiff.model.denoiser import build_chunks, wrap_data_parallel
from megadiff.model.initialisation import initialise, role_of
from megadiff.optim.optimizer import build_optimizer
from megadiff.parallel.config import Layout
from megadiff.parallel.pipeline import configure_reduction
from megadiff.parallel.row_objective import RowObjective
from megadiff.parallel.topology import (
    Topology,
    is_main_process,
    open_topology,
    process_group,
    world_size_from_environment,
)
from megadiff.platform.machine import Platform, detect
from megadiff.run_config import RunConfig
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
        model = self.config.model
        return cost.Shape(
            layers=model.layers,
            hidden=model.hidden,
            heads=model.heads,
            vocab_size=self.tokenizer.vocab_size,
            seq_length=model.seq_length,
            ffn_multiple=model.ffn_multiple,
            qk_norm=model.qk_norm,
            sink=model.sink,
            mlp_bias=model.mlp_bias,
        )


def prepare(config: RunConfig, *, world_size: int) -> Prepared:
    """Open tokenizer and data and check the layout.

    Raises:
        ConfigError, DataError: what cannot be, in one sentence.
    """
    _refuse_unbuilt(config)
    tokenizer = load_tokenizer(config.data.tokenizer)
    layout = config.layout(world_size=world_size, vocab_size=tokenizer.vocab_size)
    data = open_data(
        config.data, tokenizer, seq_length=config.model.seq_length, seed=config.seed, valid_rows=config.eval.rows
    )
    return Prepared(config, tokenizer, data, layout)


def check(config: RunConfig, *, ranks: int | None = None) -> str:
    """What `--check` prints: the resolved tree and the numbers that follow from it."""
    prepared = prepare(config, world_size=ranks or world_size_from_environment())
    return dump_config(config) + "\n" + "\n".join(describe(prepared))


def describe(prepared: Prepared) -> list[str]:
    """The derived numbers, a line each."""
    config, layout, shape = prepared.config, prepared.layout, prepared.shape
    rows = config.model.padded_vocab_size(shape.vocab_size)
    counted = cost.parameters(shape)
    memory = cost.bytes_per_rank(shape, _cost_layout(config, layout), _cost_precision(config), vocab_rows=rows)
    tokens = config.tokens_per_step
    return [
        f"parameters        {counted.total:,} ({counted.non_embedding:,} without embedding and head)",
        f"vocabulary        {shape.vocab_size:,} ids, mask {prepared.tokenizer.mask_id}, padded to {rows:,} rows",
        f"FLOPs per token   {cost.training_flops_per_token(shape):.4g} in full, "
        f"{cost.paper_flops_per_token(shape):.4g} by 6P + 12LdS (no embedding, no head)",
        f"layout            {layout.world_size} rank(s): tensor {layout.tensor} x pipeline {layout.pipeline}"
        f"{f' ({layout.virtual_pipeline} chunks each)' if layout.virtual_pipeline > 1 else ''} x data {layout.data}",
        f"tokens per step   {tokens:,} ({config.batch.global_sequences} rows of {config.model.seq_length}, "
        f"{layout.num_microbatches} microbatch(es) of {config.batch.micro_sequences} per replica)",
        f"run               {config.steps:,} steps, {config.steps * tokens:,} tokens, "
        f"{config.steps * tokens / prepared.data.train_tokens:.2f} epochs of {prepared.data.train_tokens:,} tokens",
        f"bytes per rank    {_gib(memory.total)}: parameters {_gib(memory.parameters)}, gradients "
        f"{_gib(memory.gradients)}, optimizer {_gib(memory.optimizer)}, activations {_gib(memory.activations)}, "
        f"logits {_gib(memory.logits)} (estimate)",
    ]


def run(config: RunConfig) -> None:
    """Train as `config` says, from the start or from the run folder's last complete checkpoint."""
    _log_to_console()
    platform = detect(config.platform)
    prepared = prepare(config, world_size=world_size_from_environment())
    with _run_folder(config), process_group(platform):
        platform.prepare_megatron()
        train(wire(prepared, platform))


def _log_to_console() -> None:
    """The main rank speaks; the others only warn."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main_process() else logging.WARNING)


def wire(prepared: Prepared, platform: Platform) -> Run:
    """Build every part on this rank and connect them. Collective over the world; the default group is open."""
    config = prepared.config
    topology = open_topology(prepared.layout)
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
        hidden=config.model.hidden,
        layers=config.model.layers,
        is_bf16=config.precision.compute == "bf16",
        distributed=config.parallel.distributed_optimizer,
        platform=platform,
        topology=topology,
    )
    if topology.is_main:
        for line in (
            platform.describe(),
            *describe(prepared),
            f"optimizer         {config.optimizer.name}, {optimizer.kernel}",
        ):
            log.info(line)
    first_step = _resume(prepared, chunks, optimizer, topology=topology, platform=platform)
    mixing = mixing_from(config.noise, vocab_size=prepared.tokenizer.vocab_size, mask_id=prepared.tokenizer.mask_id)
    objective = RowObjective(mixing, rate_from(config.noise), config.objective, topology)
    files = _open_files(config, first_step, topology)
    loader = _loader(prepared, mixing, topology, first_step)
    log_hook = hooks.Log(
        every=config.log.every,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
        flops_per_token=cost.training_flops_per_token(prepared.shape),
        topology=topology,
        platform=platform,
        metrics=files.metrics,
        tensorboard=files.tensorboard,
    )
    evaluate = _evaluation(prepared, objective, wrapped, topology, platform, files)
    save = partial(_save, prepared, chunks, optimizer, topology, platform)

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
        ),
        first_step=first_step,
        steps=config.steps,
        global_sequences=config.batch.global_sequences,
        microbatches_per_step=prepared.layout.num_microbatches,
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


def _loader(prepared: Prepared, mixing: HybridMixing, topology: Topology, first_step: int) -> RowLoader[NoisedRows]:
    config = prepared.config
    batch = config.batch

    def noise(clean: npt.NDArray[np.int64], samples: list[int]) -> NoisedRows:
        return noise_rows(
            clean,
            seed=config.seed,
            sample_index=samples,
            mixing=mixing,
            rate=rate_from(config.noise),
            conditioning=config.conditioning,
            stratified=config.objective.stratified,
            global_batch=batch.global_sequences,
            pad_id=prepared.tokenizer.pad_id,
        )

    return RowLoader(
        prepared.data.train,
        noise,
        batch=GlobalBatch(
            batch.global_sequences, batch.micro_sequences, dp_rank=topology.data_rank, dp_size=topology.layout.data
        ),
        first_sample=first_step * batch.global_sequences,
    )


def _evaluation(
    prepared: Prepared,
    training: RowObjective,
    chunks: Sequence[Any],
    topology: Topology,
    platform: Platform,
    files: _Files,
) -> hooks.Evaluate | None:
    config = prepared.config
    if not prepared.data.valid:
        return None
    measure = HeldOut(
        sources=prepared.data.valid,
        noise_levels=config.eval.noise_levels,
        objective=held_out_objective(training.mixing, rate=training.rate, topology=topology),
        chunks=chunks,
        topology=topology,
        device=platform.device,
        micro_sequences=config.batch.micro_sequences,
    )
    return hooks.Evaluate(config.eval.every, config.steps, measure, files.metrics, files.tensorboard)


def _resume(prepared: Prepared, chunks: Any, optimizer: Any, *, topology: Topology, platform: Platform) -> int:
    """Load the run folder's newest complete checkpoint, if there is one; returns the steps it has taken."""
    folder = store.newest_complete(prepared.config.folder) if topology.is_main else None
    folder = topology.from_main(folder)
    if folder is None:
        return 0
    saved = read_manifest(folder)
    check_same_run(saved, _manifest(prepared, saved.step), folder)
    store.load(folder, chunks, optimizer, topology=topology, platform=platform)
    if topology.is_main:
        log.info(f"going on from {folder} after step {saved.step} of {prepared.config.steps}")
    return saved.step


def _save(prepared: Prepared, chunks: Any, optimizer: Any, topology: Topology, platform: Platform, step: int) -> Path:
    run_folder = prepared.config.folder
    folder = store.save(run_folder, _manifest(prepared, step), chunks, optimizer, topology=topology, platform=platform)
    if topology.is_main:
        store.prune(run_folder, keep=prepared.config.checkpoint.keep)
    return folder


def _manifest(prepared: Prepared, step: int) -> Manifest:
    config, layout = prepared.config, prepared.layout
    samples = step * config.batch.global_sequences
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


def _cost_layout(config: RunConfig, layout: Layout) -> cost.Layout:
    return cost.Layout(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        data=layout.data,
        sequence=config.parallel.sequence,
        micro_sequences=config.batch.micro_sequences,
        distributed_optimizer=config.parallel.distributed_optimizer,
    )


def _cost_precision(config: RunConfig) -> cost.Precision:
    compute = config.precision.compute
    return cost.Precision(params=compute, compute=compute, master_weights=compute == "bf16")


def _refuse_unbuilt(config: RunConfig) -> None:
    """Say plainly what this version reads but cannot do."""
    if config.objective.name != "gidd":
        raise ConfigError(f"objective.name is {config.objective.name}, but this version trains `gidd` only")
    if config.conditioning.prompt > 0:
        raise ConfigError(
            f"conditioning.prompt is {config.conditioning.prompt}, but this version's model has no prompt attention; "
            "set conditioning.prompt=0"
        )


@contextmanager
def _run_folder(config: RunConfig) -> Iterator[None]:
    """On the main rank: make and lock the run folder, write `config.yaml`, copy the log to `log.txt`.

    Raises:
        ConfigError: the folder cannot be written, or another process trains in it.
    """
    if not is_main_process():
        yield
        return
    folder = config.folder
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except Timeout:
        raise ConfigError(
            f"another process trains in {folder} (it holds {folder / '.lock'}); give this run another `name`"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the run folder {folder} cannot be written ({error.strerror or error}); set output_dir to a folder you "
            "can write to"
        ) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        lock.release()


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g} GiB"
