"""The checkpoint from which a run resumes, and the manifest that its own checkpoints get."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

import megadiff
from megadiff.checkpoint.folder import lost_since, newest_complete
from megadiff.checkpoint.manifest import (
    FORMAT,
    Change,
    Manifest,
    check_allowed,
    check_same_model,
    check_same_run,
    read_manifest,
)
from megadiff.config.schema import dotted_keys
from megadiff.config.suggestions import did_you_mean
from megadiff.data.mixture import Mixture, next_mixture
from megadiff.data.open import OpenData
from megadiff.data.review import change_advice, describe_change
from megadiff.errors import CheckpointError, ConfigError
from megadiff.model.config import ModelConfig
from megadiff.run.config import RunConfig
from megadiff.run.context import RunContext

if TYPE_CHECKING:
    from megadiff.optim.optimizer import Optimizer
    from megadiff.parallel.pipeline import ModelChunk
    from megadiff.parallel.topology import Topology
    from megadiff.platform.machine import Platform

log = logging.getLogger("megadiff")


@dataclass(frozen=True)
class ResumeOptions:
    """The user's options for resuming a run."""

    strict: bool = False
    """Whether to refuse if the newest checkpoint is damaged, instead of taking the next older one."""
    allowed: Sequence[str] = ()
    """Settings that affect training and are nevertheless allowed to differ."""
    allow_data: bool = False
    """Whether the training data may differ."""

    def check(self, config: RunConfig) -> None:
        """Refuse allowed keys that do not exist in a configuration, or that can never change within a run.

        Args:
            config: the run's configuration, which may name its own family members with their keys.

        Raises:
            ConfigError: the first such key, with the most similar existing one.
        """
        known = {*dotted_keys(RunConfig), *dotted_keys(config)} if self.allowed else set()
        for key in self.allowed:
            if key not in known:
                raise ConfigError(f"--allow-change {key}: a run description has no such key{did_you_mean(key, known)}")
        check_allowed(self.allowed)


@dataclass(frozen=True)
class ResumeState:
    """The point from which a run starts or resumes."""

    step: int = 0
    health: dict[str, Any] = field(default_factory=dict)
    hooks: dict[str, Any] = field(default_factory=dict)
    """State of hooks of the list `hooks`, by name."""
    changes: list[Change] = field(default_factory=list)


def resume(
    prepared: RunContext,
    resume_options: ResumeOptions,
    chunks: Sequence[ModelChunk],
    optimizer: Optimizer,
    *,
    topology: Topology,
    platform: Platform,
) -> tuple[ResumeState, RunContext]:
    """Load the run's newest sound checkpoint, the one it branches from, or just the weights it starts with.

    Returns:
        The point from which the run resumes, and the run with its data at the positions reached there.

    Raises:
        CheckpointError: no checkpoint is sound and belongs to this run.
        StorageError: it cannot be read.
    """
    from megadiff.checkpoint.load import load, newest_sound  # only here: `--check` loads no megatron-core

    config = prepared.config
    own = newest_sound(config.folder, strict=resume_options.strict, topology=topology)
    if own is None and config.checkpoint.start_from is None:
        return ResumeState(), prepared
    folder = own or Path(config.checkpoint.start_from or "")
    accepted = _accepted(prepared, resume_options, folder)
    saved, is_verified = accepted.saved, own is not None
    if not saved.has_optimizer:
        load(folder, chunks, None, is_verified=is_verified, topology=topology, platform=platform)
        optimizer.take_weights()
        log.info(f"starting with the weights of {folder}; optimizer and schedule start from scratch")
        _warn(accepted, topology)
        return ResumeState(), prepared
    load(folder, chunks, optimizer, is_verified=is_verified, topology=topology, platform=platform)
    log.info(f"resuming from {folder} after step {saved.step} of {config.steps}")
    for line in accepted.describe():
        log.info(line)
    _warn(accepted, topology)
    return ResumeState(saved.step, saved.health, saved.hooks, [*saved.changes, *accepted.changes]), accepted.prepared


def _warn(accepted: _Accepted, topology: Topology) -> None:
    for doubt in accepted.doubts() if topology.is_main else []:
        log.warning(doubt)


def foresee_resumption(prepared: RunContext, resume_options: ResumeOptions) -> tuple[RunContext, int, list[str]]:
    """Return what `resume` would do, reading no more than a manifest.

    Returns:
        The run with its data at the positions reached, the steps taken, and lines that describe where it resumes;
        no lines for a run that starts.

    Raises:
        CheckpointError: `resume` would refuse.
    """
    config = prepared.config
    folder = newest_complete(config.folder)
    if folder is None and config.checkpoint.start_from is not None:
        folder = Path(config.checkpoint.start_from)
    if folder is None:
        return prepared, 0, []
    accepted = _accepted(prepared, resume_options, folder)
    lost = lost_since(config.folder, folder) if accepted.saved.has_optimizer else None
    begins = f"resumes from      {folder} after step {accepted.saved.step} of {config.steps}"
    if not accepted.saved.has_optimizer:
        begins = f"weights of        {folder}, with a new optimizer and schedule from step 0 on"
    lines = [
        begins,
        *accepted.describe(),
        *(f"warning           {doubt}" for doubt in ([lost] if lost else []) + accepted.doubts()),
    ]
    return accepted.prepared, accepted.saved.step if accepted.saved.has_optimizer else 0, lines


@dataclass(frozen=True)
class _Accepted:
    """A checkpoint from which this run may resume."""

    saved: Manifest
    changes: list[Change]
    prepared: RunContext
    """The run with its data at the positions reached."""
    mixture_before: Mixture | None = None
    """The mixture of the checkpoint, if the run continues with a different one."""

    def describe(self) -> list[str]:
        """Return lines about the changes since the checkpoint."""
        lines = [f"changed since     {change.describe()}" for change in self.changes]
        if self.mixture_before is not None:
            lines += describe_change(self.mixture_before, self.prepared.data, end=self.prepared.config.samples)
        return lines

    def doubts(self) -> list[str]:
        """Return warnings about weights that predict at other positions, a cooldown begun before, another mixture."""
        if not self.saved.has_optimizer:
            return [] if (moved := self._moved()) is None else [moved]
        found = [cooled] if (cooled := self._cooled_before()) is not None else []
        if self.mixture_before is not None:
            changed = change_advice(self.mixture_before, self.prepared.data, end=self.prepared.config.samples)
            found += [str(doubt) for doubt in changed]
        return found

    def _moved(self) -> str | None:
        """Return a warning if the weights were trained to predict at other positions than this run has them predict."""
        config = self.prepared.config
        if config.method.name == "next_token":
            return None
        model, method = self.saved.config.get("model", {}), self.saved.config.get("method", {})
        was_shifted = model.get("alignment") == "shifted" or method.get("name") == "next_token"
        if was_shifted == (config.model.alignment == "shifted"):
            return None
        target, natural = ("after each position", "shifted") if was_shifted else ("at each position", "same")
        return (
            f"model.alignment is {config.model.alignment}, but these weights were trained to predict the token {target}"
            f", so part of what they know is lost; model.alignment={natural} keeps it"
        )

    def _cooled_before(self) -> str | None:
        """Return a warning if the checkpoint was saved while the learning rate fell towards an earlier end."""
        config, step = self.prepared.config, self.saved.step
        try:
            before = RunConfig.model_validate(self.saved.config).lr_schedule()
        except ValidationError:  # of another version, whose settings are compared as they stand
            return None
        began, now = before.decay_start, config.lr_schedule().decay_start
        if began is None or not began < step < config.steps or (now is not None and now <= began):
            return None
        return (
            f"the learning rate has been falling since step {began}, as this run was to end at step {before.steps}; it "
            f"rises again now, and the curve is not that of a run of {config.steps} steps: for that, go on from a "
            f"checkpoint up to step {began} (checkpoint.start_from, with another name)"
        )


def _accepted(prepared: RunContext, resume_options: ResumeOptions, folder: Path) -> _Accepted:
    """Return the checkpoint's manifest and the changes since, if this run may resume from it."""
    saved, steps = of_this_version(read_manifest(folder)), prepared.config.steps
    is_own = prepared.config.folder in folder.parents
    if prepared.config.checkpoint.weights_only and not is_own:
        saved = saved.model_copy(update={"has_optimizer": False})
    wanted = manifest_of(prepared, ResumeState(saved.step), saved.step)
    is_planned = _begins_a_phase(prepared.data, saved)
    if is_planned:
        wanted = wanted.model_copy(update={"data_fingerprint": saved.data_fingerprint})
    if not saved.has_optimizer:
        check_same_model(_with_sizes(saved), _with_sizes(wanted), folder)
        return _Accepted(saved, [], prepared)
    changes = check_same_run(
        saved,
        wanted,
        folder,
        allowed=resume_options.allowed,
        allow_data=resume_options.allow_data,
        is_own=is_own,
    )
    if saved.step > steps:
        raise CheckpointError(
            f"{folder} was saved after step {saved.step}, but this run ends after step {steps}; set schedule.steps "
            "above that, or begin from an earlier checkpoint"
        )
    before, data = saved_mixture(prepared, saved, folder), prepared.data.at(saved.samples)
    if saved.data_fingerprint == data.fingerprint:
        return _Accepted(saved, changes, prepared.at(before, saved.samples))
    mixture = next_mixture(before, data.identities, first_sample=saved.samples)
    accepted = prepared.at(mixture, saved.samples)
    return _Accepted(saved, changes, accepted, None if is_planned else before)


def _begins_a_phase(data: OpenData, saved: Manifest) -> bool:
    """Return whether the next sample begins a phase that the run which saved the checkpoint did not know."""
    phase, before = data.at(saved.samples), data.at(saved.samples - 1)
    return phase is not before and saved.data_fingerprint == before.fingerprint != phase.fingerprint


def of_this_version(saved: Manifest) -> Manifest:
    """Return a manifest whose model has, at their defaults, the settings that an older version did not know."""
    known = {name: key.default for name, key in ModelConfig.model_fields.items() if not key.is_required()}
    config = {**saved.config, "model": {**known, **saved.config.get("model", {})}}
    return saved.model_copy(update={"config": config})


def _with_sizes(manifest: Manifest) -> Manifest:
    """Return a manifest whose model has every size as a number, however the description gave it."""
    model = ModelConfig.model_validate(manifest.config["model"])
    sizes = {
        "kv_heads": model.key_heads,
        "head_dim": model.head_width,
        "ffn_hidden": model.mlp_width,
        "ffn_multiple": None,
        "resid_scale": model.resid_factor,
        "head_scale": model.head_factor,
    }
    return manifest.model_copy(update={"config": {**manifest.config, "model": {**model.model_dump(), **sizes}}})


def saved_mixture(prepared: RunContext, saved: Manifest, folder: Path) -> Mixture:
    """Return the mixture of a checkpoint, with the positions reached.

    Raises:
        CheckpointError: the manifest holds no mixture of its data.
    """
    try:
        mixture = Mixture.model_validate(saved.mixture)
    except ValidationError as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder} is damaged: its manifest.json has no positions of the data ({first})"
        ) from None
    contents, data = [position.content for position in mixture.sources], prepared.data.at(saved.samples)
    if saved.data_fingerprint == data.fingerprint and contents != data.contents:
        raise CheckpointError(f"{folder} is damaged: the positions in its manifest.json are of other data")
    return mixture


def manifest_of(
    prepared: RunContext,
    origin: ResumeState,
    step: int,
    *,
    health: dict[str, Any] | None = None,
    hooks: dict[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of a checkpoint after `step` steps of this run, without its files.

    Args:
        prepared: the run.
        origin: where it resumed from.
        step: number of steps taken.
        health: state of the health checks.
        hooks: state of hooks of the list `hooks`, by name.
    """
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
        data_fingerprint=prepared.data.at(samples).fingerprint,
        prepended_bos=bool(prepared.data.prepended_bos),
        chat_templates=prepared.data.chat_templates,
        layout={
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual_pipeline": layout.virtual_pipeline,
            "data": layout.data,
        },
        versions={
            "megadiff": megadiff.__version__,
            "torch": version("torch"),
            "megatron-core": version("megatron-core"),
        },
        mixture=prepared.data.mixture_at(samples).model_dump(mode="json"),
        health=health or {},
        hooks=hooks or {},
        changes=origin.changes,
    )
