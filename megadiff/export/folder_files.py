"""Files of an exported folder: their names, kinds and checksums.

Every file that `checksums.sha256` lists is compared, and every file that an import reads must be in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megadiff.checkpoint.folder import entry_of
from megadiff.checkpoint.manifest import FileEntry, what_it_is
from megadiff.errors import CheckpointError, shown
from megadiff.files import UnreadableFileError, open_plain, read_text, why, write_atomically

CONFIG = "config.json"
TRAINING = "training.json"
"""Name of the run's own configuration, which an export of megadiff adds."""
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
WEIGHTS = ".safetensors"
"""Suffix of every weight file that is read."""

CHECKSUMS = "checksums.sha256"

MAX_OTHER_BYTES = 2**28
"""Maximal size of a listed file without weights; the largest tokenizers have some tens of megabytes."""

_READ = (CONFIG, TRAINING, INDEX, "tokenizer.json", "tokenizer_config.json")
_READ_ENDINGS = (WEIGHTS, ".model")
_MAX_LIST_BYTES = 2**22
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


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


def check_folder(folder: Path) -> None:
    """Refuse anything that is not a Hugging Face folder, and a file to be read that is not plain or lies outside of it.

    Raises:
        CheckpointError: it says what the folder or the file is instead.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{folder} is {what_it_is(folder)}; give a folder with {CONFIG} and safetensors weights, such as "
            "save_pretrained or an export wrote"
        )
    for name in read_files(folder):
        plain_file(folder, name)
    if plain_file(folder, CONFIG) is None:
        raise CheckpointError(
            f"{folder} has no {CONFIG}: it is {what_it_is(folder)}; give one that save_pretrained or an export wrote"
        )


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


def write_checksums(folder: Path, known: Mapping[str, FileEntry]) -> None:
    """List every file of a folder.

    Args:
        folder: the folder, in which `checksums.sha256` is written.
        known: hashes that need not be computed again, by file name.
    """
    names = sorted(path.name for path in folder.iterdir())
    lines = [f"{(known.get(name) or entry_of(folder / name)).sha256}  {name}\n" for name in names]
    write_atomically(folder / CHECKSUMS, "".join(lines))


class Checksums:
    """The checksums of one folder; empty if it has none."""

    def __init__(self, folder: Path) -> None:
        """Read the list and check that it covers what an import reads.

        Raises:
            CheckpointError: the list cannot be read, a line is not in the format of `sha256sum`, a name points outside
                the folder, or a file that an import reads is not listed.
        """
        self.folder = folder
        self._listed = _listed(folder)
        self.exists = self._listed is not None
        for name in read_files(folder) if self.exists else []:
            if name not in self.names:
                raise CheckpointError(
                    f"{folder / name} is not listed in {CHECKSUMS}, so its content cannot be checked; fetch the folder "
                    f"again, or remove {CHECKSUMS} to take its files as they are"
                )

    @property
    def names(self) -> set[str]:
        """Names of the listed files."""
        return {name for _, name in self._listed or []}

    def compare(self, *, weights: bool) -> None:
        """Compare the weight files, or all other files, with the list.

        Args:
            weights: whether to compare the weight files, which take long to read, or the others.

        Raises:
            CheckpointError: a listed file is missing, is not a plain file, or has different content.
        """
        for digest, name in self._listed or []:
            if name.endswith(WEIGHTS) != weights:
                continue
            path = plain_file(self.folder, name)
            if path is None:
                raise CheckpointError(
                    f"{self.folder / name} is missing, which {CHECKSUMS} lists; fetch the folder again"
                )
            if not weights and path.stat().st_size > MAX_OTHER_BYTES:
                raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; fetch it again")
            if entry_of(path).sha256 != digest:
                raise CheckpointError(
                    f"{path} is damaged or was changed: its content is not what {CHECKSUMS} says; fetch it again, or, "
                    f"if the change is meant, write the list again (sha256sum * > {CHECKSUMS}) or remove it"
                )


def _listed(folder: Path) -> list[tuple[str, str]] | None:
    """Return (SHA-256, file name) of every line; None if there is no list."""
    path = plain_file(folder, CHECKSUMS)
    if path is None:
        return None
    try:
        text = read_text(path, max_bytes=_MAX_LIST_BYTES)
    except (UnreadableFileError, OSError) as error:
        raise CheckpointError(
            f"{path} {why(error)}; fetch it again, or remove it to take the files as they are"
        ) from None
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.rstrip("\r"))
        if match is None:
            raise CheckpointError(f"{path}:{number} is not a line of sha256sum but {shown(line)}; fetch it again")
        name = match[2].removeprefix("./")
        if Path(name).name != name or name in (".", "..") or len(name.encode()) > 255:
            raise CheckpointError(f"{path}:{number} lists {shown(name)}, no file of the folder; fetch it again")
        if name != CHECKSUMS:
            found.append((match[1].lower(), name))
    return found
