"""Where a run goes on from, and what its checkpoints say of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import megadiff
from megadiff.checkpoint.folder import newest_complete
from megadiff.checkpoint.load import load, newest_sound
from megadiff.checkpoint.manifest import (
    FORMAT,
    Change,
    Manifest,
    check_same_model,
    check_same_run,
    read_manifest,
)
from megadiff.errors import CheckpointError
from megadiff.optim.optimizer import Optimizer
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform
from megadiff.prepared import Prepared

log = logging.getLogger("megadiff")


@dataclass(frozen=True)
class Resumption:
    """What a user may say of how a run is taken up again."""

    strict: bool = False
    """Refuse when the newest checkpoint is damaged, instead of taking the next older."""
    allowed: Sequence[str] = ()
    """Settings that matter and may differ all the same."""
    allow_data: bool = False
    """Whether the training data may differ."""


@dataclass(frozen=True)
class Origin:
    """Where a run goes on from."""

    step: int = 0
    health: dict[str, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)


def resume(
    prepared: Prepared,
    resumption: Resumption,
    chunks: Sequence[Any],
    optimizer: Optimizer,
    *,
    topology: Topology,
    platform: Platform,
) -> Origin:
    """Load the run's newest sound checkpoint, or the one it branches from, or weights alone that it begins with.

    Raises:
        CheckpointError: there is none that is sound and of this run.
        StorageError: it cannot be read.
    """
    config = prepared.config
    own = newest_sound(config.folder, strict=resumption.strict, topology=topology)
    if own is None and config.checkpoint.start_from is None:
        return Origin()
    folder = own or Path(config.checkpoint.start_from or "")
    saved, changes = _accepted(prepared, resumption, folder)
    is_verified = own is not None
    if not saved.has_optimizer:
        load(folder, chunks, None, is_verified=is_verified, topology=topology, platform=platform)
        optimizer.take_weights()
        log.info(f"beginning with the weights of {folder}; optimizer and schedule begin anew")
        return Origin()
    load(folder, chunks, optimizer, is_verified=is_verified, topology=topology, platform=platform)
    log.info(f"going on from {folder} after step {saved.step} of {config.steps}")
    for change in changes:
        log.info(f"changed since     {change.describe()}")
    return Origin(saved.step, saved.health, [*saved.changes, *changes])


def describe_origin(prepared: Prepared, resumption: Resumption) -> list[str]:
    """What the run would go on from, told without reading more than a manifest; nothing for a run that begins.

    Raises:
        CheckpointError: it would be refused.
    """
    config = prepared.config
    folder = newest_complete(config.folder)
    if folder is None and config.checkpoint.start_from is not None:
        folder = Path(config.checkpoint.start_from)
    if folder is None:
        return []
    saved, changes = _accepted(prepared, resumption, folder)
    said = [f"changed since     {change.describe()}" for change in changes]
    return [f"goes on from      {folder} after step {saved.step} of {config.steps}", *said]


def _accepted(prepared: Prepared, resumption: Resumption, folder: Path) -> tuple[Manifest, list[Change]]:
    """The checkpoint's manifest and what was changed since, if this run may go on from it."""
    saved, steps = read_manifest(folder), prepared.config.steps
    wanted = manifest_of(prepared, Origin(saved.step), saved.step)
    if not saved.has_optimizer:
        check_same_model(saved, wanted, folder)
        return saved, []
    changes = check_same_run(saved, wanted, folder, allowed=resumption.allowed, allow_data=resumption.allow_data)
    if saved.step > steps:
        raise CheckpointError(
            f"{folder} was saved after step {saved.step}, but this run ends after step {steps}; set schedule.steps "
            "above that, or begin from an earlier checkpoint"
        )
    return saved, changes


def manifest_of(prepared: Prepared, origin: Origin, step: int, *, health: dict[str, Any] | None = None) -> Manifest:
    """What a checkpoint after `step` steps says of this run, but for its files."""
    config, layout = prepared.config, prepared.layout
    samples = config.sizes.samples_before(step)
    return Manifest(
        format=FORMAT,
        step=step,
        samples=samples,
        tokens=samples * config.model.seq_length,
        config=config.model_dump(mode="json", by_alias=True),
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
        health=health or {},
        changes=origin.changes,
    )
