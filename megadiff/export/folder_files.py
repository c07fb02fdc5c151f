"""The files of a Hugging Face folder that an import reads, and the check that they are plain files inside it."""

from __future__ import annotations

import os
from pathlib import Path

from megadiff.errors import CheckpointError
from megadiff.untrusted_files import UnreadableFileError, open_plain, why

CONFIG = "config.json"
TRAINING = "training.json"
"""Name of the run's own configuration, which an export of megadiff adds."""
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
WEIGHTS = ".safetensors"
"""Suffix of every weight file that is read."""

_READ = (CONFIG, TRAINING, INDEX, "tokenizer.json", "tokenizer_config.json")
_READ_ENDINGS = (WEIGHTS, ".model")


def read_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that an import reads, sorted.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror or error}); check its permissions") from None
    return [name for name in names if name in _READ or name.endswith(_READ_ENDINGS)]


def check_files(folder: Path) -> None:
    """Refuse a folder in which a file that an import reads is not a plain file, or is a link to outside the folder.

    Raises:
        CheckpointError: names the file and its kind.
    """
    for name in read_files(folder):
        plain_file(folder, name)


def plain_file(folder: Path, name: str) -> Path | None:
    """Return the path of a file in the folder; None if there is none.

    A link may point to another file of the folder, or, as in the cache of the Hugging Face hub, from
    `snapshots/REVISION/` to `blobs/` beside `snapshots/`.

    Raises:
        CheckpointError: it is not a plain file, cannot be opened, or is a link to anywhere else.
    """
    path = folder / name
    if os.path.islink(path) and not _stays(folder, path):
        raise CheckpointError(f"{path} is a link that leads out of the folder; copy the file into the folder instead")
    try:
        open_plain(path).close()
    except FileNotFoundError:
        return None
    except (UnreadableFileError, OSError) as error:
        raise CheckpointError(f"{path} {why(error)}; fetch it again") from None
    return path


def _stays(folder: Path, link: Path) -> bool:
    try:
        target, home = link.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # circular links
        return False
    if target.parent == home:
        return True
    return home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
