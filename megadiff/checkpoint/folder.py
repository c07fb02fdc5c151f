"""The `checkpoints/` folder of a run: which step folders there are, which are whole, which may go.

Only names that a run writes are ever touched, and never what a symlink points at.
"""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

from megadiff.checkpoint.durable import entry_of, sync
from megadiff.checkpoint.manifest import FILE_NAME, SUM_NAME, Manifest, read_manifest
from megadiff.config.refusals import similar_path
from megadiff.errors import CheckpointError

_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_STAGING = re.compile(r"\.step_\d{8,}\.tmp")
_SET_ASIDE = re.compile(r"step_\d{8,}\.bad(\.\d+)?")
_LOOKS, _PAUSE_S = 3, 1.0


def step_folder(run_folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def staging_folder(final: Path) -> Path:
    """Where that checkpoint is written until it is whole; the loader does not know such names."""
    return final.with_name(f".{final.name}.tmp")


def newest_complete(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run whose files all have the sizes its manifest says; None if there is none.

    `LATEST` is a hint, not the truth: if it names a newer one than can be seen, a network file system may be late to
    show it, so the folder is looked at again before an older one is taken.

    Raises:
        CheckpointError: there are checkpoints and none is whole; a run must not start again over them unasked.
    """
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_S)
        found = next((folder for folder in step_folders(run_folder) if is_complete(folder)), None)
        hint = _hinted_step(run_folder)
        if hint is None or (found is not None and step_of(found) >= hint) or _was_seen_damaged(run_folder, hint):
            break
    if found is None and (broken := [*step_folders(run_folder), *_set_aside(run_folder)]):
        raise CheckpointError(
            f"{run_folder / 'checkpoints'} holds {len(broken)} checkpoint(s) and all are damaged (the newest is "
            f"{broken[0].name}); move them away to start the run again, or give it another `name`"
        )
    return found


def chosen(path: Path) -> Path:
    """The checkpoint that is meant by a step folder, or by a run folder: its newest.

    Raises:
        CheckpointError: there is none.
    """
    if (path / FILE_NAME).is_file():
        return path
    newest = newest_complete(path)
    if newest is None:
        what = "no such folder" if not path.exists() else "no complete checkpoint in it"
        if not path.exists() and (near := similar_path(path)) is not None:
            what += f"; did you mean {near}?"
        raise CheckpointError(
            f"{path}: {what}; give a run folder (such as runs/NAME) or one of its checkpoints/step_* folders"
        )
    return newest


def damaged(run_folder: Path) -> list[Path]:
    """Step folders that are no whole checkpoints, newest first."""
    return [folder for folder in step_folders(run_folder) if not is_complete(folder)]


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint to `step_XXXXXXXX.bad`, kept for a person to look at; returns the new path."""
    target = folder.with_name(f"{folder.name}.bad")
    number = 1
    while target.exists() or target.is_symlink():
        number += 1
        target = folder.with_name(f"{folder.name}.bad.{number}")
    folder.rename(target)
    sync(folder.parent)
    return target


def prune(run_folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints; 0 keeps all.

    At least two stay whatever is asked: the newest may yet prove damaged on load, when its hashes are checked.
    """
    folders = step_folders(run_folder)
    complete = [folder for folder in folders if is_complete(folder)]
    kept = complete[: max(keep, 2)] if keep else complete
    for folder in complete[len(kept) :]:
        delete(folder)
    for folder in folders:  # what a deletion that was killed has left of older ones
        if kept and step_of(folder) < step_of(kept[-1]) and not (folder / FILE_NAME).exists():
            delete(folder)


def clear_staging(run_folder: Path) -> None:
    """Delete what killed saves left; call only while no save is under way."""
    for path in (run_folder / "checkpoints").glob(".step_*.tmp"):
        if _STAGING.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def delete(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: a half-deleted folder must never look complete."""
    (folder / FILE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def verify_files(folder: Path, *, hashes: bool, share: int = 0, of: int = 1) -> Manifest:
    """Check the files of a checkpoint against its manifest.

    Args:
        hashes: read them and compare SHA-256 as well.
        share, of: with `hashes`, read only every `of`-th file beginning with the `share`-th largest.

    Raises:
        CheckpointError: a file is missing, or of another size or content than was written.
    """
    manifest = read_manifest(folder)
    if _STEP_FOLDER.fullmatch(folder.name) and manifest.step != step_of(folder):
        raise CheckpointError(
            f"{folder} is damaged: its {FILE_NAME} is of step {manifest.step}; take another checkpoint of the run"
        )
    if not manifest.files:
        raise CheckpointError(f"{folder / FILE_NAME} is damaged: it lists no files; take another checkpoint of the run")
    for name, entry in manifest.files.items():
        path = folder / name
        if Path(name).name != name or name in (FILE_NAME, SUM_NAME) or path.is_symlink() or not path.is_file():
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
    """Whether all files are there with the sizes that were written."""
    try:
        verify_files(folder, hashes=False)
    except (CheckpointError, OSError):
        return False
    return True


def step_folders(run_folder: Path) -> list[Path]:
    """Step folders, newest step first; a symlink is not one."""
    found = [path for path in (run_folder / "checkpoints").glob("step_*") if _STEP_FOLDER.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a step folder's name."""
    match = _STEP_FOLDER.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def _refuse_strangers(folder: Path, manifest: Manifest) -> None:
    """A file the manifest does not list was not written by the save: the loader would read a shard it names."""
    for path in sorted(folder.iterdir()):
        if path.name not in (FILE_NAME, SUM_NAME) and path.name not in manifest.files:
            raise CheckpointError(
                f"{folder} is damaged: it holds {path.name!r}, which its {FILE_NAME} does not list; move that file away"
            )


def _set_aside(run_folder: Path) -> list[Path]:
    found = (run_folder / "checkpoints").glob("step_*.bad*")
    return sorted((path for path in found if _SET_ASIDE.fullmatch(path.name)), reverse=True)


def _hinted_step(run_folder: Path) -> int | None:
    path = run_folder / "LATEST"
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    except OSError:
        return None
    match = _STEP_FOLDER.fullmatch(text)
    return int(match[1]) if match else None


def _was_seen_damaged(run_folder: Path, step: int) -> bool:
    """Whether the step is there and broken, or was put aside, so that waiting for it is idle."""
    name = step_folder(run_folder, step).name
    aside = any(path.name.startswith(f"{name}.bad") for path in _set_aside(run_folder))
    return aside or step_folder(run_folder, step).exists()
