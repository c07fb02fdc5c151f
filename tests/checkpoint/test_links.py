"""Checkpoints that lie elsewhere and are linked back: they are loaded or refused, and never touched."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from megadiff.checkpoint import folder as folders
from megadiff.errors import CheckpointError, StorageError
from tests.checkpoint.conftest import STEPS, checkpoint, shard_of
from tests.support.ranks import on_ranks
from tests.support.runs import read_metrics, train_on_rank
from tests.support.whole_runs import Ranks, run_to_end


def _content(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder, links not followed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_ino, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _archive(run, tmp_path: Path, *steps: int, is_relative: bool = False) -> Path:
    """Move checkpoints to an archive and link them back."""
    archive = tmp_path / "archive"
    archive.mkdir(exist_ok=True)
    for step in steps:
        folder = checkpoint(run, step)
        moved = shutil.move(folder, archive / folder.name)
        folder.symlink_to(os.path.relpath(moved, folder.parent) if is_relative else moved)
    return archive


def _longer(run, steps: int, **settings):
    """The same run with more steps and a checkpoint every second one."""
    return run.model_copy(
        update={
            "schedule": run.schedule.model_copy(update={"steps": steps, "decay_steps": 0.0}),
            "checkpoint": run.checkpoint.model_copy(update={"keep": 2, **settings}),
        }
    )


def _resume(config):
    trained = train_on_rank(config, 1, save=True)
    return [line["step"] for line in trained.lines]


@pytest.mark.parametrize(("steps", "is_relative"), [((2,), False), ((6,), True), (STEPS, False)])
def test_a_run_resumes_from_linked_checkpoints_and_keeps_the_archive(run, tmp_path, steps, is_relative):
    archive = _archive(run, tmp_path, *steps, is_relative=is_relative)
    before = _content(archive)
    resumed = _longer(run, 14)

    steps_written = on_ranks(1, _resume, resumed)[0]

    assert steps_written == list(range(1, 15)), "nothing is trained again"
    assert _content(archive) == before
    assert all(checkpoint(run, step).is_symlink() for step in steps), "the links stay too"
    assert not (archive.parent / "toy/metrics.superseded.jsonl").exists()
    assert folders.newest_complete(run.folder) == checkpoint(run, 14)


def test_linked_checkpoints_do_not_count_among_those_that_are_kept(run, tmp_path):
    _archive(run, tmp_path, 4, 6)
    for step in (8, 10, 12):
        shutil.copytree(checkpoint(run, 6), checkpoint(run, step))
    folders_before = {path.name for path in (run.folder / "checkpoints").iterdir()}
    whole = {f"step_{step:08d}" for step in (2, 4, 6, 8, 10, 12)}
    assert folders_before == whole

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(folders, "is_complete", lambda folder: True)
        folders.prune(run.folder, keep=2)

    left = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert left == whole - {"step_00000002", "step_00000008"}


@pytest.mark.parametrize("harm", ["dangling", "cut", "looped", "a file"])
def test_a_newer_link_that_cannot_be_loaded_is_refused_in_a_sentence(run, tmp_path, harm):
    """An older checkpoint would be there, but the newer one may come back: the run must not overtake it."""
    archive = _archive(run, tmp_path, 6)
    link = checkpoint(run, 6)
    if harm == "dangling":
        shutil.move(archive, tmp_path / "elsewhere")
    elif harm == "cut":
        os.truncate(shard_of(archive / link.name), 100)
    else:
        link.unlink()
        link.symlink_to(link.name if harm == "looped" else run.folder / "metrics.jsonl")
    before = sorted(path.name for path in (run.folder / "checkpoints").iterdir())

    with pytest.raises(CheckpointError, match=r"step_00000006 is a link to .* cannot be loaded: .*nothing was changed"):
        folders.newest_complete(run.folder)

    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == before
    link.unlink()
    assert folders.newest_complete(run.folder) == checkpoint(run, 4)


def test_a_linked_checkpoint_with_changed_bytes_is_refused_not_renamed(run, tmp_path):
    from tests.checkpoint.test_folder import loads

    archive = _archive(run, tmp_path, 6)
    shard = shard_of(archive / "step_00000006")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    said = on_ranks(1, loads, [run])[0][0]

    assert "is damaged and is, or holds, a link; remove it from the run folder" in said
    assert checkpoint(run, 6).is_symlink()


@pytest.mark.parametrize("name", ["shard", "manifest.json"])
def test_a_link_inside_a_step_folder_is_neither_followed_nor_deleted(run, tmp_path, name):
    folder = checkpoint(run, 2)
    path = shard_of(folder) if name == "shard" else folder / name
    target = tmp_path / "precious"
    shutil.move(path, target)
    path.symlink_to(target)
    before = target.read_bytes()

    with pytest.raises(CheckpointError, match="which is a link; put the file itself there"):
        folders.verify_files(folder, hashes=False)
    folders.prune(run.folder, keep=2)
    with pytest.raises(CheckpointError, match="is not deleted"):
        folders.delete(folder)
    with pytest.raises(CheckpointError, match="is, or holds, a link"):
        folders.set_aside(folder)

    assert path.is_symlink()
    assert target.read_bytes() == before


def test_hard_links_to_an_archive_keep_their_content(run, tmp_path):
    """Make a backup as `cp --archive --link` does: names are added, bytes do not change."""
    archive = tmp_path / "archive"
    shutil.copytree(run.folder, archive, copy_function=os.link)
    before = _content(archive)

    on_ranks(1, _resume, _longer(run, 14))

    assert not checkpoint(run, 2).exists()
    assert _content(archive) == before


@pytest.mark.parametrize("linked", ["checkpoints", "toy", "tensorboard", "LATEST", "metrics.jsonl"])
def test_parts_of_a_run_folder_may_be_links_to_another_disk(run, tmp_path, linked):
    place = run.folder if linked == "toy" else run.folder / linked
    if linked == "tensorboard":
        place.mkdir()
        (place / "events.out.tfevents.1.earlier").write_bytes(b"kept")
    disk = tmp_path / "disk"
    disk.mkdir()
    moved = Path(shutil.move(place, disk / linked))
    place.symlink_to(moved)
    outside = moved.read_bytes() if moved.is_file() else b""
    log = run.log.model_copy(update={"tensorboard": True})

    steps = on_ranks(1, _resume, _longer(run, 10).model_copy(update={"log": log}))[0]

    assert steps == list(range(1, 11))
    assert folders.newest_complete(run.folder) == checkpoint(run, 10)
    if moved.is_dir():
        assert place.is_symlink()
        assert linked != "tensorboard" or (moved / "events.out.tfevents.1.earlier").read_bytes() == b"kept"
    else:
        assert moved.read_bytes() == outside, "the file that a link names is replaced in the run folder alone"


def test_a_save_does_not_replace_a_link_that_has_its_name(run, tmp_path):
    """The run says so, trains on, and saves the next one."""
    precious = tmp_path / "precious"
    shutil.copytree(checkpoint(run, 2), precious)
    before = _content(precious)
    resumed = _longer(run, 12)

    def put_link(config):
        from tests.support.runs import wire_on_rank

        wired = wire_on_rank(config, 1)
        (config.folder / "checkpoints/step_00000008").symlink_to(precious)

        wired.train()

    on_ranks(1, put_link, resumed)

    assert _content(precious) == before
    assert checkpoint(run, 8).is_symlink()
    assert folders.newest_complete(run.folder) == checkpoint(run, 12)


LOST = {
    "emptied": lambda run: [shutil.rmtree(path) for path in (run.folder / "checkpoints").iterdir()],
    "gone": lambda run: shutil.rmtree(run.folder / "checkpoints"),
    "a dangling link": lambda run: (
        shutil.rmtree(run.folder / "checkpoints"),
        (run.folder / "checkpoints").symlink_to("/no/such/disk"),
    ),
    "a file": lambda run: (shutil.rmtree(run.folder / "checkpoints"), (run.folder / "checkpoints").touch()),
    "emptied, LATEST too": lambda run: (
        shutil.rmtree(run.folder / "checkpoints"),
        (run.folder / "LATEST").unlink(),
        (run.folder / "status.json").write_text(
            '{"state": "failed", "step": 6, "steps": 9, "reason": "", "exit_code": 1, "job": null, "attempt": 0, '
            '"host": "h", "time": "t", "launch": "", "saved_step": 6}'
        ),
    ),
}


@pytest.mark.parametrize("loss", LOST)
def test_a_run_whose_checkpoints_are_lost_does_not_start_over(run, loss, monkeypatch):
    monkeypatch.setattr(folders, "_PAUSE_S", 0.0)
    LOST[loss](run)
    before = _content(run.folder)

    launched = Ranks(_longer(run, 10), 1)
    assert launched.end(within_s=60) == [2]

    said = launched.said(0)
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: this run has saved itself before (")
    assert "bring its checkpoints back (is the disk mounted?) and run the same command again" in said
    after = _content(run.folder)
    for name in ("metrics.jsonl", *(["LATEST"] if "LATEST" in before else [])):
        assert after[name] == before[name]


def test_a_run_that_died_before_its_first_checkpoint_keeps_its_records(run):
    shutil.rmtree(run.folder / "checkpoints")
    (run.folder / "LATEST").unlink()
    old = (run.folder / "metrics.jsonl").read_bytes() + b'{"step": 7, "lo'
    (run.folder / "metrics.jsonl").write_bytes(old)

    run_to_end(run, 1)

    assert [line["step"] for line in read_metrics(run.folder / "metrics.jsonl")] == list(range(1, 7))
    assert (run.folder / "metrics.superseded.jsonl").read_bytes() == old + b"\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("place", ["checkpoints", "step_00000006"])
def test_an_unreadable_folder_never_means_starting_over_or_an_older_one(run, monkeypatch, place, number):
    """A checkpoint that cannot be read now is not damaged."""

    def refusing(original):
        def read(path, *args):
            if Path(path).name == place:
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *args)

        return read

    monkeypatch.setattr(Path, "iterdir", refusing(Path.iterdir))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    with pytest.raises(StorageError, match=rf"{place} cannot be read \({os.strerror(number)}\); check the disk"):
        folders.newest_complete(run.folder)
    monkeypatch.undo()
    assert folders.newest_complete(run.folder) == checkpoint(run, 6)
