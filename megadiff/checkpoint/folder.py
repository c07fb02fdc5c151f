"""The `checkpoints/` folder of a run: which checkpoints exist, are complete, may be deleted; hashed files.

`checkpoints/` may be a link to another disk. Inside it only names that a run writes are ever touched, and links are
never followed to change anything: a step folder that is a link, or contains one, belongs to somebody else. A linked
folder can be loaded, but nothing in it is deleted, renamed or replaced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megadiff.checkpoint.manifest import (
    FILE_NAME,
    SUM_NAME,
    FileEntry,
    Manifest,
    no_checkpoint,
    read_manifest,
    what_it_is,
)
from megadiff.config.suggestions import similar_path
from megadiff.errors import CheckpointError, ConfigError, StorageError, shown
from megadiff.files import UnreadableFileError, read_bytes, sync
from megadiff.supervision.status import read_status

_BLOCK = 2**20


class HashingFile:
    """A new file whose SHA-256 is computed while it is written, so that it need not be read back for hashing.

    It has the methods that torch's writers call on a stream: `write`, `tell`, `flush`. A path that exists is refused.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.failure: OSError | None = None
        """Cause of a failed write, which torch's zip writer would turn into "unexpected pos 30 vs 0"."""

    def write(self, data: bytes | memoryview) -> int:
        """Append the data and return the number of bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._digest.update(data)
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        self._bytes += size
        return size

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Pass buffered bytes to the operating system."""
        self._file.flush()

    def sync(self) -> None:
        """Wait until all bytes are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close without waiting for the disk."""
        self._file.close()

    def entry(self) -> FileEntry:
        """Return the size and hash of what was written."""
        return FileEntry(bytes=self._bytes, sha256=self._digest.hexdigest())


@contextmanager
def hashed_file(path: Path) -> Iterator[HashingFile]:
    """Write a new file, which is on the disk once the block is left without an error.

    Raises:
        OSError: the first error of a write, even if torch has replaced it by another exception.
    """
    file = HashingFile(path)
    try:
        yield file
        file.sync()
    except RuntimeError:
        if file.failure is not None:
            raise file.failure from None
        raise
    finally:
        file.close()


def entry_of(path: Path) -> FileEntry:
    """Read a file and return its size and SHA-256."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return FileEntry(bytes=size, sha256=digest.hexdigest())


_STEP_FOLDER = re.compile(r"step_(\d{8,18})")
_STAGING = re.compile(r"\.step_\d{8,}\.tmp")
_SET_ASIDE = re.compile(r"step_\d{8,}\.bad(\.\d+)?")
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_LOOKS, _PAUSE_S = 3, 1.0
_MAX_HINT_BYTES = 200


def step_folder(run_folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def staging_folder(final: Path) -> Path:
    """Return the folder in which that checkpoint is written until it is complete; the loader ignores such names."""
    return final.with_name(f".{final.name}.tmp")


def newest_complete(run_folder: Path) -> Path | None:
    """Return the newest checkpoint of a run whose files all have the sizes in its manifest; None if there is none.

    `LATEST` is a hint only. If it names a newer checkpoint than can be seen, a network file system may not show it
    yet, so the folder is read again before an older one is taken.

    Raises:
        CheckpointError: there are checkpoints and none is complete; or a newer one is behind a link and cannot be
            loaded; or the run has saved itself before but no checkpoint can be found, and must not silently start over.
        StorageError: the folder cannot be read.
    """
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_S)
        found = _newest_whole(run_folder)
        hint = _hinted_step(run_folder)
        if hint is None or (found is not None and step_of(found) >= hint) or _was_seen_damaged(run_folder, hint):
            break
    if found is not None:
        return found
    if broken := [*step_folders(run_folder), *_set_aside(run_folder)]:
        raise CheckpointError(
            f"{run_folder / 'checkpoints'} holds {len(broken)} checkpoint(s) and all are damaged (the newest is "
            f"{broken[0].name}); move them away to start the run again, or give it another `name`"
        )
    if (evidence := _evidence_of_checkpoints(run_folder)) is not None:
        folder = run_folder / "checkpoints"
        raise CheckpointError(
            f"this run has saved itself before ({evidence}), but {folder} {_what_is_seen(folder)}; bring its "
            f"checkpoints back (is the disk mounted?) and run the same command again; to start over, move "
            f"{run_folder} away or give the run another `name`"
        )
    return None


def chosen(path: Path) -> Path:
    """Return the checkpoint for a given path: a step folder itself, or the newest one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if os.path.isfile(path / FILE_NAME):
        return path
    newest = newest_complete(path) if os.path.isdir(path) else None
    if newest is not None:
        return newest
    kind = what_it_is(path)
    if kind == "a Hugging Face folder":
        raise CheckpointError(no_checkpoint(path))
    what = "no complete checkpoint in it;" if os.path.isdir(path) else f"{kind};"
    if kind == "no such folder" and (near := similar_path(path, Path.is_dir)) is not None:
        what += f" did you mean {near}?"
    raise CheckpointError(
        f"{path}: {what} give a run folder (such as runs/NAME) or one of its checkpoints/step_* folders"
    )


def lost_since(run_folder: Path, found: Path) -> str | None:
    """Return a sentence about a newer checkpoint that a run wrote and that is not there; None if there is none."""
    hint = _hinted_step(run_folder)
    if hint is None or hint <= step_of(found) or _was_seen_damaged(run_folder, hint):
        return None
    return (
        f"LATEST names the checkpoint of step {hint}, which is not in {run_folder / 'checkpoints'}; the run goes on "
        f"from step {step_of(found)}"
    )


def damaged(run_folder: Path, *, after_step: int) -> list[Path]:
    """Return the step folders after a step that are not complete checkpoints, newest first.

    Raises:
        StorageError: they cannot be read.
    """
    newer = [folder for folder in step_folders(run_folder) if step_of(folder) > after_step]
    return [folder for folder in newer if not is_complete(folder)]


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to `step_XXXXXXXX.bad`, for inspection by the user, and return the new path.

    Raises:
        CheckpointError: it is a link or contains one; it is left unchanged.
    """
    if is_foreign(folder):
        raise CheckpointError(
            f"{folder} is damaged and is, or holds, a link; remove it from the run folder to resume from an older "
            "checkpoint, or put whole files in its place"
        )
    target = folder.with_name(f"{folder.name}.bad")
    number = 1
    while target.exists() or target.is_symlink():
        number += 1
        target = folder.with_name(f"{folder.name}.bad.{number}")
    folder.rename(target)
    sync(folder.parent)
    return target


def is_foreign(folder: Path) -> bool:
    """Return whether a folder is a link, is mounted, or contains a link.

    No run writes such a folder, and no run may delete it.
    """
    if folder.is_symlink() or os.path.ismount(folder):
        return True
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return any(entry.is_symlink() for entry in entries)
    return False


def prune(run_folder: Path, *, keep: int, before_cooldown: int | None = None) -> None:
    """Delete all but the newest `keep` complete checkpoints; 0 keeps all.

    At least two are kept whatever `keep` is, because the newest may prove damaged on loading, when its hashes are
    checked. A checkpoint that is a link, or contains one, is neither deleted nor counted.

    Args:
        before_cooldown: the step at which the cooldown begins; the newest checkpoint at or before it is kept too, since
            other cooldowns branch from it.
    """
    folders = [folder for folder in step_folders(run_folder) if not is_foreign(folder)]
    complete = [folder for folder in folders if is_complete(folder)]
    kept = complete[: max(keep, 2)] if keep else complete
    branching = next((folder for folder in complete if step_of(folder) <= (before_cooldown or -1)), None)
    for folder in complete[len(kept) :]:
        if folder != branching:
            delete(folder)
    for folder in folders:  # the remains of an interrupted deletion of older ones
        if kept and step_of(folder) < step_of(kept[-1]) and not os.path.lexists(folder / FILE_NAME):
            delete(folder)


def clear_staging(run_folder: Path) -> None:
    """Delete the remains of interrupted saves; call this only while no save is running.

    Of a link only the link itself is deleted.
    """
    for path in _entries(run_folder / "checkpoints"):
        if not _STAGING.fullmatch(path.name):
            continue
        if path.is_symlink():
            path.unlink(missing_ok=True)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def delete(folder: Path) -> None:
    """Delete a checkpoint, its manifest first, so that a half-deleted folder never looks complete.

    Raises:
        CheckpointError: the folder is a link or contains one; nothing is deleted.
    """
    if is_foreign(folder):
        raise CheckpointError(f"{folder} is, or holds, a link, and is not deleted; remove it from the run folder")
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(FILE_NAME, dir_fd=handle)
    finally:
        os.close(handle)
    shutil.rmtree(folder, ignore_errors=True)


def verify_files(folder: Path, *, hashes: bool, share: int = 0, of: int = 1) -> Manifest:
    """Check the files of a checkpoint against its manifest.

    Args:
        hashes: whether to read the files and compare their SHA-256 as well.
        share, of: with `hashes`, read only every `of`-th file, beginning with the `share`-th largest.

    Raises:
        CheckpointError: a file is missing, or has another size or content than was written.
    """
    _refuse_links(folder)
    manifest = read_manifest(folder)
    if _STEP_FOLDER.fullmatch(folder.name) and manifest.step != step_of(folder):
        raise CheckpointError(
            f"{folder} is damaged: its {FILE_NAME} belongs to step {manifest.step}; take another checkpoint of the run"
        )
    if not manifest.files:
        raise CheckpointError(f"{folder / FILE_NAME} is damaged: it lists no files; take another checkpoint of the run")
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name or name in (FILE_NAME, SUM_NAME) or not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name!r} is missing; take another checkpoint of the run")
        if path.stat().st_size != entry.bytes:
            raise CheckpointError(
                f"{path} is damaged: {path.stat().st_size} bytes instead of {entry.bytes}; take another checkpoint"
            )
    _refuse_strangers(folder, manifest)
    largest_first = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    for name in largest_first[share::of] if hashes else []:
        if entry_of(folder / name).sha256 != manifest.files[name].sha256:
            raise CheckpointError(
                f"{folder / name} is damaged: its content has changed since it was written; take another one"
            )
    return manifest


def is_complete(folder: Path) -> bool:
    """Return whether all files exist with the sizes that were written.

    Raises:
        StorageError: the folder cannot be read, so that nothing is known about it.
    """
    try:
        verify_files(folder, hashes=False)
    except CheckpointError:
        return False
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return False
        raise _unreadable(folder, error) from None
    return True


def step_folders(run_folder: Path) -> list[Path]:
    """Return the step folders, including links to folders, newest step first.

    Raises:
        StorageError: `checkpoints/` cannot be read.
    """
    found = [path for path in _entries(run_folder / "checkpoints") if _STEP_FOLDER.fullmatch(path.name)]
    try:
        found = [path for path in found if path.is_symlink() or path.is_dir()]
    except OSError as error:
        raise _unreadable(run_folder / "checkpoints", error) from None
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step in a step folder's name."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def _newest_whole(run_folder: Path) -> Path | None:
    """Return the newest complete checkpoint.

    Damaged ones are skipped, unless they are or contain links; those raise a CheckpointError.
    """
    for folder in step_folders(run_folder):
        if is_complete(folder):
            return folder
        if not is_foreign(folder):
            continue
        target = f"a link to {os.readlink(folder)}" if folder.is_symlink() else "a folder that holds links"
        reason = _problem(folder) if folder.exists() else "there is nothing there (is its disk mounted?)"
        raise CheckpointError(
            f"{folder} is {target} and cannot be loaded: {reason}; make it loadable, or remove it from the run folder "
            "to resume from an older checkpoint (nothing was changed)"
        )
    return None


def _problem(folder: Path) -> str:
    try:
        verify_files(folder, hashes=False)
    except (CheckpointError, OSError) as error:
        return str(error)
    return "it changed while it was read"


def _evidence_of_checkpoints(run_folder: Path) -> str | None:
    """Return evidence that this run has completed a checkpoint; None if there is none."""
    if os.path.lexists(run_folder / "LATEST"):
        hint = _hinted_step(run_folder)
        return f"LATEST names step {hint}" if hint is not None else "it has a file LATEST"
    status = read_status(run_folder)
    if status is None:
        return None
    step = status.step_of_checkpoint
    return f"status.json names step {step}" if step else None


def _what_is_seen(folder: Path) -> str:
    if folder.is_symlink() and not folder.exists():
        return f"is a link to {os.readlink(folder)}, where there is nothing"
    return "is empty" if folder.is_dir() else "is not there" if not os.path.lexists(folder) else "is no folder"


def _entries(folder: Path) -> list[Path]:
    """Return the entries of a folder; an empty list if there is no such folder.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return list(folder.iterdir())
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return []
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigError(
                f"{shown(str(folder))} is too long for a path; give a shorter output_dir or name"
            ) from None
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{error.filename or folder} cannot be read ({error.strerror or error}); check the disk and its permissions "
        "and run the same command again (nothing was changed)"
    )


def _refuse_links(folder: Path) -> None:
    """Raise a CheckpointError if a checkpoint contains a link, through which any file might be read."""
    linked: list[str] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        linked = sorted(entry.name for entry in entries if entry.is_symlink())
    if linked:
        raise CheckpointError(
            f"{folder} holds {linked[0]!r}, which is a link; put the file itself there, or link the whole folder"
        )


def _refuse_strangers(folder: Path, manifest: Manifest) -> None:
    """Raise a CheckpointError if the folder contains a file that the manifest does not list.

    The save did not write such a file, but the loader would read it as a shard.
    """
    for path in sorted(folder.iterdir()):
        if path.name not in (FILE_NAME, SUM_NAME) and path.name not in manifest.files:
            raise CheckpointError(
                f"{folder} is damaged: it holds {path.name!r}, which its {FILE_NAME} does not list; move that file away"
            )


def _set_aside(run_folder: Path) -> list[Path]:
    found = _entries(run_folder / "checkpoints")
    return sorted((path for path in found if _SET_ASIDE.fullmatch(path.name)), reverse=True)


def _hinted_step(run_folder: Path) -> int | None:
    path = run_folder / "LATEST"
    try:
        text = read_bytes(path, max_bytes=_MAX_HINT_BYTES).decode("utf-8", "replace").strip()
    except (OSError, UnreadableFileError):
        return None
    match = _STEP_FOLDER.fullmatch(text)
    return int(match[1]) if match else None


def _was_seen_damaged(run_folder: Path, step: int) -> bool:
    """Return whether the step's folder exists or was set aside as damaged, so that waiting for it is pointless."""
    name = step_folder(run_folder, step).name
    aside = any(path.name.startswith(f"{name}.bad") for path in _set_aside(run_folder))
    return aside or step_folder(run_folder, step).exists()
