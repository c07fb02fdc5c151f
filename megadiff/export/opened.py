"""Opening of anything that commands accept as `--model`, in this process.

A path is checked before torch and megatron-core are loaded, so that a wrong one is refused at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megadiff.checkpoint.folder import chosen
from megadiff.checkpoint.manifest import read_manifest, what_it_is
from megadiff.platform.quiet import quiet

if TYPE_CHECKING:
    from megadiff.run.load_model import InferenceModel


@contextmanager
def open_model(
    path: str | Path,
    *,
    platform: Literal["auto", "cpu", "cuda"] = "auto",
    tokenizer: str | None = None,
) -> Iterator[InferenceModel]:
    """Open a run folder, one of its step folders, or a Hugging Face folder (this package's, or a released `gidd` one).

    A Hugging Face folder is first converted to a checkpoint in the system's temporary folder, which exists while the
    model is open; so it is the trainer's model that is evaluated, and no code of the folder is run.

    Args:
        path: the folder.
        platform: the machine to use.
        tokenizer: path to use instead of the one the run was configured with, or the folder's own.

    Raises:
        CheckpointError: there is no such folder, or it is damaged.
        DataError: the tokenizer is missing, or is not the one that the model was trained with.
    """
    folder = Path(path)
    is_checkpoint = what_it_is(folder) != "a Hugging Face folder"
    if is_checkpoint:
        folder = chosen(folder)
        read_manifest(folder)
    with quiet():
        from megadiff.run.load_model import load_model
    if is_checkpoint:
        with load_model(folder, platform=platform, tokenizer=tokenizer) as trained:
            yield trained
        return
    from megadiff.export.importing import import_folder

    with tempfile.TemporaryDirectory(prefix="megadiff-") as work:
        imported = import_folder(folder, Path(work) / "checkpoint", tokenizer=tokenizer)
        with load_model(imported.folder, platform=platform, tokenizer=tokenizer) as trained:
            yield replace(trained, folder=folder)
