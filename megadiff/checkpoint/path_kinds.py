"""Recognition of a path that was given instead of a checkpoint, a run folder or a Hugging Face folder."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

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
        return f"{path}: there is {kind}; give a step_* folder written by a run"
    return (
        f"{path} is not a complete checkpoint: it has no {MANIFEST_NAME}; give a step_* folder written by a run "
        f"(it is {kind})"
    )
