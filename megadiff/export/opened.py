"""Whatever the commands take as `--model`, opened in this one process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megadiff.checkpoint.path_kinds import what_it_is
from megadiff.export.importing import import_folder
from megadiff.trained import TrainedModel, open_trained


@contextmanager
def open_model(
    path: str | Path,
    *,
    platform: Literal["auto", "cpu", "cuda"] = "auto",
    tokenizer: str | None = None,
) -> Iterator[TrainedModel]:
    """Open a run folder, one of its step folders, or a Hugging Face folder (ours, or a released `gidd` one).

    The latter is turned into a checkpoint in the system's temporary folder first, as long as the model is open; so it
    is the trainer's model that is measured, and no code of the folder is run.

    Args:
        tokenizer: path to use instead of the one the run was configured with, or the folder's own.

    Raises:
        CheckpointError: nothing of the kind there, or a damaged one.
        DataError: the tokenizer is missing, or another one than the model was trained with.
    """
    folder = Path(path)
    if what_it_is(folder) != "a Hugging Face folder":
        with open_trained(folder, platform=platform, tokenizer=tokenizer) as trained:
            yield trained
        return
    with tempfile.TemporaryDirectory(prefix="megadiff-") as work:
        imported = import_folder(folder, Path(work) / "checkpoint", tokenizer=tokenizer)
        with open_trained(imported.folder, platform=platform, tokenizer=tokenizer) as trained:
            yield replace(trained, folder=folder)
