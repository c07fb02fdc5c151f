"""The description a checkpoint carries of itself, the settings that must match on resumption, and kinds of paths."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megadiff.config.suggestions import similar_path
from megadiff.errors import SHOWN_DIGITS, CheckpointError, ConfigError, StorageError
from megadiff.files import UnreadableFileError, read_bytes

MANIFEST_NAME = "manifest.json"
"""Name of the file that is written last into a checkpoint; a folder without it is not a checkpoint."""


def what_it_is(path: Path) -> str:
    """Return a description of the thing at a path, with its article, to complete a sentence that begins with `it
    is`."""
    if not os.path.lexists(path):
        is_prefix = any(os.path.isfile(f"{path}{suffix}") for suffix in (".idx", ".bin"))
        return "the prefix of indexed data" if is_prefix else "no such folder"
    if not os.path.isdir(path):
        return "a link that leads nowhere" if not os.path.exists(path) else "a file"
    try:
        names = {entry.name for entry in os.scandir(path)}
    except OSError as error:
        return f"a folder that cannot be read ({error.strerror})"
    if MANIFEST_NAME in names:
        return "a training checkpoint"
    if "config.json" in names:
        return "a Hugging Face folder"
    if names & {"checkpoints", "LATEST", "metrics.jsonl"}:
        return "a run folder"
    if any(name.startswith("step_") for name in names):
        return "a folder of checkpoints"
    return "another folder" if names else "an empty folder"


def no_checkpoint(path: Path) -> str:
    """Return the message that refuses a path where a checkpoint is needed, with advice on what to give instead."""
    kind = what_it_is(path)
    if kind == "a Hugging Face folder":
        command = f"megadiff convert_checkpoint import --input {shlex.quote(str(path))} --output NEW_FOLDER"
        return f"{path} is a Hugging Face folder, not a checkpoint to train from; run `{command}` and give NEW_FOLDER"
    if kind == "a run folder":
        kind += f", so one of {path / 'checkpoints'}/step_* is meant"
    if kind.startswith("no "):
        near = similar_path(path, Path.is_dir)
        hint = f"; did you mean {near}?" if near is not None else ""
        return f"{path}: there is {kind}{hint}; give a step_* folder written by a run"
    return (
        f"{path} is not a complete checkpoint: it has no {MANIFEST_NAME}; give a step_* folder written by a run "
        f"(it is {kind})"
    )


FORMAT = 6
"""Version of the manifest; a change of meaning raises it. 2: the manifest has a checksum of its own. 3: it has the
positions of the data's sources, which a program that does not know them would lose. 4: the configuration inside names
the noise process and the settings of families by new keys. 5: sequences, batches and schedules have the field's
names. 6: `method.name` stands where `objective.name` did. No other version is read.
"""

FILE_NAME = MANIFEST_NAME
SUM_NAME = "manifest.sha256"
"""Name of the file with the manifest's own checksum, in the format of `sha256sum --check`."""

_MAX_BYTES = 2**28
_MAX_SUM_BYTES = 200

MUST_MATCH = (
    "seed",
    "model",
    "noise",
    "objective",
    "method",
    "conditioning",
    "batch.global_batch_size",
    "batch.rampup",
    "optimizer.name",
    "optimizer.parametrisation",
    "precision.compute",
    "precision.master_weights",
)
"""Settings that define the run: they must not change on resuming; all others may."""

_NEVER_MATTERS = ("objective.loss_kernel",)
"""Settings among those that affect only the way of computing, not the result."""

MAY_BE_ALLOWED = ("seed", "noise", "objective", "method", "conditioning")
"""Settings among those that the user may allow to change, because the saved weights and optimizer state remain
valid."""

_VOCABULARY = ("vocab_size", "mask_id", "tokenizer_fingerprint")

_IDENTITY = (*_VOCABULARY, "data_fingerprint")

_NOT_OF_THE_WEIGHTS = tuple(
    f"model.{key}"
    for key in ("init_scale", "embed_init", "head_init", "seq_length", "rope_base", "rope_scaling", "alignment")
)
"""Settings of the model that may differ when a run begins with the weights of another."""

_OF_THE_SEQUENCES = ("data.padding", "data.packing")
"""Settings by which the same files become other sequences, if they hold conversations."""

_NOT_WORTH_RECORDING = ("name", "output_dir", "checkpoint.start_from")


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    bytes: int = Field(ge=0, le=2**62)
    sha256: str


class Change(BaseModel):
    """A setting that had another value in an earlier attempt of the same run."""

    after_step: int
    key: str
    before: Any
    now: Any

    def describe(self) -> str:
        """Return `key: before -> now`; fingerprints are shortened to their first digits."""
        before, now = self.before, self.now
        if self.key.endswith("_fingerprint"):
            before, now = str(before)[:SHOWN_DIGITS], str(now)[:SHOWN_DIGITS]
        return f"{self.key}: {json.dumps(before)} -> {json.dumps(now)}"


class Manifest(BaseModel):
    """The contents of `manifest.json`, which is written last: a folder without it is not a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = Field(ge=0, le=2**31)
    step: int = Field(ge=0, le=2**62)
    samples: int = Field(ge=0, le=2**62)
    """Number of sequences the run has trained on."""
    tokens: int = Field(ge=0, le=2**62)
    config: dict[str, Any]
    """The resolved configuration tree."""
    vocab_size: int = Field(gt=1, lt=2**31)
    mask_id: int = Field(ge=0, lt=2**31)
    tokenizer_fingerprint: str
    data_fingerprint: str
    prepended_bos: bool = False
    """Whether every document of the training data begins with bos, so that prompts do too."""
    chat_templates: list[str] = []
    """SHA-256 (hex) of the chat templates that made the training data, as far as their manifests name them."""
    layout: dict[str, int]
    versions: dict[str, str]
    mixture: dict[str, Any] = {}
    """Positions of the training data's sources (`data.mixture.Mixture`); empty for imported weights."""
    health: dict[str, float | list[float]] = {}
    """State of the run's health checks: the number of consecutive skipped steps, and running statistics."""
    hooks: dict[str, Any] = {}
    """State of hooks of the run's list `hooks`, by name."""
    has_optimizer: bool = True
    """Whether an optimizer state is included. It is not if the weights came from elsewhere; a run that begins with them
    has a new optimizer and begins at step 0."""
    changes: list[Change] = []
    """Settings that were changed when the run was resumed, oldest first."""
    files: dict[str, FileEntry] = {}

    def write(self, folder: Path) -> None:
        """Write `manifest.json` and its checksum into `folder`."""
        text = self.model_dump_json(indent=1).encode()
        (folder / FILE_NAME).write_bytes(text)
        (folder / SUM_NAME).write_text(f"{hashlib.sha256(text).hexdigest()}  {FILE_NAME}\n", encoding="ascii")


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        CheckpointError: it is missing, damaged, or of a format this version does not know.
        StorageError: it cannot be read.
    """
    path = folder / FILE_NAME
    try:
        text = read_bytes(path, max_bytes=_MAX_BYTES)
        manifest = Manifest.model_validate_json(text)
        checksum = _read_checksum(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(no_checkpoint(folder)) from None
    except OSError as error:
        if error.errno == errno.ELOOP:  # links that lead in a circle are no fault of the disk
            raise CheckpointError(f"{path} is damaged ({error.strerror}); take another checkpoint of the run") from None
        raise StorageError(
            f"{error.filename or path} cannot be read ({error.strerror or error}); check the disk and its permissions"
        ) from None
    except UnreadableFileError as error:
        raise CheckpointError(f"{path} is damaged: it {error}; take another checkpoint of the run") from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({first}); take another checkpoint of the run") from None
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.format}, this version reads {FORMAT}; use the megadiff version that wrote it"
        )
    if checksum != f"{hashlib.sha256(text).hexdigest()}  {FILE_NAME}\n".encode():
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is not the one in {SUM_NAME}; take another checkpoint of the run"
        )
    return manifest


def _read_checksum(path: Path) -> bytes:
    """Return the checksum file beside a manifest; empty if there is none or it is not a regular file."""
    try:
        return read_bytes(path.with_name(SUM_NAME), max_bytes=_MAX_SUM_BYTES)
    except (FileNotFoundError, UnreadableFileError):
        return b""


def check_same_run(
    saved: Manifest,
    wanted: Manifest,
    folder: Path,
    *,
    allowed: Sequence[str] = (),
    allow_data: bool = False,
    is_own: bool = True,
) -> list[Change]:
    """Refuse to resume from a checkpoint whose settings, tokenizer or data differ in a way that matters.

    Args:
        allowed: keys, or sections, whose change is accepted; keys that may change anyway are accepted here too.
        allow_data: whether other training data are accepted.
        is_own: whether the checkpoint is in the run's own folder, and not one that `checkpoint.start_from` names.

    Returns:
        All accepted differences, to be recorded; those that never matter are included.

    Raises:
        CheckpointError: names every difference that matters as `key: saved -> wanted`.
        ConfigError: a key in `allowed` can never change (`check_allowed`).
    """
    check_allowed(allowed)
    changes = _changes(saved.step, "", saved.config, wanted.config)
    changes += [_change(saved, wanted, key) for key in _IDENTITY if getattr(saved, key) != getattr(wanted, key)]
    refused = [change for change in changes if _matters(change.key, allowed, allow_data)]
    if not refused:
        return [change for change in changes if change.key not in _NOT_WORTH_RECORDING]
    listed = "; ".join(
        _describe_data(change, changes) if change.key == "data_fingerprint" else change.describe() for change in refused
    )
    advice = "Give the run another `name`, or"
    if not is_own:
        is_same_model = not any(_is_of_the_weights(change.key) for change in refused)
        advice = "Set checkpoint.weights_only=true to take its weights alone, or give" if is_same_model else "Give"
        advice += " this run"
    raise CheckpointError(
        f"{folder} belongs to another run; these settings differ (checkpoint -> this run): {listed}. "
        f"{advice} the settings it was started with{_ways_out(refused)}"
    )


def _describe_data(change: Change, changes: Sequence[Change]) -> str:
    """Return the description of other training data: of their list if it changed, else of what else decides them."""
    named = [other.describe() for other in changes if _is_at_or_below(other.key, "data.train")]
    if named:
        return "; ".join(named)
    cut = [f"{other.describe()}, " for other in changes if other.key in _OF_THE_SEQUENCES]
    return f"{change.describe()} ({''.join(cut)}the contents of data.train, or the end by which budgets are spent)"


def check_allowed(allowed: Sequence[str]) -> None:
    """Refuse keys, alone or inside a section, that can never change within a run.

    Raises:
        ConfigError: names the first such key.
    """
    for key in allowed:
        fixed = [other for other in MUST_MATCH if _is_at_or_below(key, other) or _is_at_or_below(other, key)]
        fixed = [other for other in fixed if other not in MAY_BE_ALLOWED and key not in _NEVER_MATTERS]
        if fixed:
            inside = "" if _is_at_or_below(key, fixed[0]) else f"{', '.join(fixed)} in "
            raise ConfigError(
                f"--allow-change {key}: {inside}{'it' if inside else 'this'} cannot change inside a run; "
                f"--allow-change is for {', '.join(MAY_BE_ALLOWED)}; settings that do not define a run (such as "
                "batch.micro_batch_size or optimizer.lr) may always change"
            )


def _is_of_the_weights(key: str) -> bool:
    """Return whether weights of another value of a setting cannot be taken."""
    if key in _VOCABULARY:
        return True
    return _is_at_or_below(key, "model") and not any(_is_at_or_below(key, other) for other in _NOT_OF_THE_WEIGHTS)


def check_same_model(saved: Manifest, wanted: Manifest, folder: Path) -> None:
    """Refuse the weights of another model or another vocabulary.

    Raises:
        CheckpointError: names every difference.
    """
    changes = [
        change
        for change in _changes(saved.step, "model", saved.config.get("model"), wanted.config.get("model"))
        if _is_of_the_weights(change.key)
    ]
    changes += [_change(saved, wanted, key) for key in _VOCABULARY if getattr(saved, key) != getattr(wanted, key)]
    if changes:
        listed = "; ".join(change.describe() for change in changes)
        raise CheckpointError(
            f"{folder} holds the weights of another model (checkpoint -> this run): {listed}; set these to the "
            "checkpoint's values"
        )


def differences(saved: Manifest, wanted: Mapping[str, Any]) -> list[Change]:
    """Return every setting that differs between a checkpoint and a tree, except names of runs and folders."""
    return [
        change for change in _changes(saved.step, "", saved.config, wanted) if change.key not in _NOT_WORTH_RECORDING
    ]


def _matters(key: str, allowed: Sequence[str], allow_data: bool) -> bool:
    if key == "data_fingerprint":
        return not allow_data
    if key in _NEVER_MATTERS or any(_is_at_or_below(key, other) for other in allowed):
        return False
    return key in _IDENTITY or any(_is_at_or_below(key, other) for other in MUST_MATCH)


def _ways_out(refused: Sequence[Change]) -> str:
    ways = [
        f"--allow-change {change.key}"
        for change in refused
        if any(_is_at_or_below(change.key, other) for other in MAY_BE_ALLOWED)
    ]
    ways += ["--allow-data-change"] * any(change.key == "data_fingerprint" for change in refused)
    return f"; to resume anyway, with the change recorded: {' '.join(ways)}" if len(ways) == len(refused) else ""


def _is_at_or_below(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


def _change(saved: Manifest, wanted: Manifest, key: str) -> Change:
    return Change(after_step=saved.step, key=key, before=getattr(saved, key), now=getattr(wanted, key))


def _changes(step: int, key: str, saved: Any, wanted: Any) -> list[Change]:
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        return [
            change
            for part in sorted(set(saved) | set(wanted))
            for change in _changes(step, f"{key}.{part}" if key else part, saved.get(part), wanted.get(part))
        ]
    return [] if saved == wanted else [Change(after_step=step, key=key, before=saved, now=wanted)]
