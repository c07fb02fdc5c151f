"""The file `checksums.sha256` of a Hugging Face folder, in the format of `sha256sum`: written by the export, checked
by the import.

Every file in the list is compared, and every file that an import reads must be in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from megadiff.checkpoint.durable import entry_of
from megadiff.checkpoint.manifest import FileEntry
from megadiff.errors import CheckpointError, shown
from megadiff.export.folder_files import WEIGHTS, plain_file, read_files
from megadiff.files import write_atomically
from megadiff.untrusted_files import UnreadableFileError, read_text, why

CHECKSUMS = "checksums.sha256"

_MAX_BYTES = 2**22
MAX_OTHER_BYTES = 2**28
"""Maximal size of a listed file without weights; the largest tokenizers have some tens of megabytes."""
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


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
        text = read_text(path, max_bytes=_MAX_BYTES)
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
