"""What a checkpoint says about itself, and what must match when a run takes it up again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megadiff.errors import CheckpointError

FORMAT = 1
"""Version of the manifest; a change of meaning raises it."""

FILE_NAME = "manifest.json"

MUST_MATCH = (
    "seed",
    "model",
    "noise",
    "objective",
    "conditioning",
    "batch.global_sequences",
    "batch.ramp",
    "optimizer.name",
    "optimizer.parametrisation",
    "parallel.distributed_optimizer",
    "precision.compute",
    "precision.master_weights",
)
"""Settings whose change makes a resumed run another run; everything else may change."""


class FileEntry(BaseModel):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """`manifest.json`: written last, so a folder without one is not a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int
    step: int
    samples: int
    """Rows the run has trained on."""
    tokens: int
    config: dict[str, Any]
    """The resolved tree."""
    vocab_size: int
    mask_id: int
    tokenizer_fingerprint: str
    data_fingerprint: str
    layout: dict[str, int]
    versions: dict[str, str]
    files: dict[str, FileEntry] = {}

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        (folder / FILE_NAME).write_text(self.model_dump_json(indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        CheckpointError: it is missing, damaged, or of a format this version does not know.
    """
    path = folder / FILE_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a complete checkpoint: it has no {FILE_NAME}; give a step_* folder written by a run"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is damaged ({first}); take another checkpoint of the run") from None
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.format}, this version reads {FORMAT}; use the megadiff version that wrote it"
        )
    return manifest


def check_same_run(saved: Manifest, wanted: Manifest, folder: Path) -> None:
    """Refuse to go on from a checkpoint whose settings, tokenizer or data differ where it matters.

    Raises:
        CheckpointError: with every difference as `key: saved -> wanted`.
    """
    differences = []
    for key in MUST_MATCH:
        differences += _differences(key, _at(saved.config, key), _at(wanted.config, key))
    for key in ("vocab_size", "mask_id", "tokenizer_fingerprint", "data_fingerprint"):
        differences += _differences(key, getattr(saved, key), getattr(wanted, key))
    if differences:
        raise CheckpointError(
            f"{folder} belongs to another run; these settings differ (checkpoint -> this run): "
            + "; ".join(differences)
            + ". Give the run another `name`, or the settings it was started with"
        )


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _differences(key: str, saved: Any, wanted: Any) -> list[str]:
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        return [
            line
            for part in sorted(set(saved) | set(wanted))
            for line in _differences(f"{key}.{part}", saved.get(part), wanted.get(part))
        ]
    return [] if saved == wanted else [f"{key}: {json.dumps(saved)} -> {json.dumps(wanted)}"]
