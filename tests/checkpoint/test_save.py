"""A save that ends anywhere leaves the old checkpoint or the new one, and a full disk does not end the run."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from megadiff.checkpoint.folder import newest_complete, verify_files
from megadiff.train.hooks.checkpoint import CheckpointHook
from tests.support.disk import watched_disk
from tests.support.ranks import on_ranks
from tests.support.runs import read_metrics, toy_config, train_on_rank, wire_on_rank


def _config(corpus, output, **changes):
    return toy_config(corpus, output, **{"model__layers": 1, "data__valid": [], **changes})


def _saves_of(run):
    return next(hook for hook in run.hooks if isinstance(hook, CheckpointHook))


def _step_and_save(run, saves, step):
    """One real step, then its checkpoint."""
    run.step([next(run.microbatches) for _ in range(run.microbatches_of(step - 1))], 1e-3)
    saver = saves.checkpointer
    outcome = saver.start(saves.manifest(step))
    return outcome if outcome is not None else saver.finish()


def _states_of_a_save(config, world_size, states):
    """Save steps 1 and 2 as usual, then step 3 with the folder copied before every change to the disk."""
    run = wire_on_rank(config, world_size)
    saves = _saves_of(run)
    for step in (1, 2):
        assert _step_and_save(run, saves, step).error is None
    saves.checkpointer._wait_for_pruning()
    lock, number = threading.Lock(), [0]
    rank = run.step.topology.rank
    original_rename = os.rename

    def keep_state(what):
        with lock:
            number[0] += 1
            making = states / f".{rank}-{number[0]:05d}"
            for _ in range(100):  # the other rank may be renaming what is being copied
                shutil.rmtree(making, ignore_errors=True)
                try:
                    shutil.copytree(config.folder, making, copy_function=_copy_or_link)
                    break
                except (shutil.Error, FileNotFoundError):
                    time.sleep(0.001)
            original_rename(making, states / f"{rank}-{number[0]:05d}")
            (states / f"{rank}-{number[0]:05d}" / "what").write_text(what)

    with watched_disk(keep_state):
        outcome = _step_and_save(run, saves, 3)
        saves.checkpointer._wait_for_pruning()
    assert outcome.error is None, outcome.error
    run.close()
    return number[0]


def _copy_or_link(source, target):
    """Files of a completed checkpoint never change again."""
    return os.link(source, target) if Path(source).parent.name.startswith("step_") else shutil.copy2(source, target)


def _inodes(folder: Path) -> tuple[tuple[str, int], ...]:
    """Names and inodes: in states with the same ones the files are the same."""
    return tuple(sorted((path.name, path.stat().st_ino) for path in folder.iterdir()))


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kill_before_any_disk_change_leaves_a_whole_checkpoint(toy_corpus, tmp_path, ranks):
    """What SIGKILL leaves is what has reached the file system: every such state is looked at."""
    config = _config(toy_corpus, tmp_path, parallel__tensor=ranks, checkpoint__keep=2)
    states = tmp_path / "states"
    states.mkdir()
    old = tmp_path / "toy/checkpoints/step_00000002"
    counts = on_ranks(ranks, _states_of_a_save, config, ranks, states)
    new = tmp_path / "toy/checkpoints/step_00000003"
    found = {"old": 0, "new": 0}
    told, verified = set(), set()
    for state in sorted(states.iterdir()):
        told.add((state / "what").read_text().split()[0])
        newest = newest_complete(state)
        assert newest is not None, state
        if (inodes := _inodes(newest)) not in verified:  # links to the same files in most states
            verify_files(newest, hashes=True)
            assert _same_files(newest, {"step_00000002": old, "step_00000003": new}[newest.name]), state
            verified.add(inodes)
        complete = [path for path in (state / "checkpoints").glob("step_*") if (path / "manifest.json").is_file()]
        assert len(complete) >= 2, f"{state}: two whole ones stay at every moment"
        found["new" if newest.name == new.name else "old"] += 1
    print(f"{sum(counts)} states of {ranks} rank(s): {found}")
    assert sum(found.values()) == sum(counts) > 100
    assert found["new"] >= 3
    assert told >= {"mkdir", "open", "write", "half", "fsync", "rename", "replace", "unlink", "rmdir"}


def _order_of_a_save(config):
    """What happens to the files of a step folder, in order; descriptors by the names of their files."""
    run = wire_on_rank(config, 1)
    saves = _saves_of(run)
    done = []

    def note(what):
        kind, name = what.split(maxsplit=1)
        if name.isdigit():
            name = os.readlink(f"/proc/self/fd/{name}")
        done.append((kind, name))

    with watched_disk(note):
        outcome = _step_and_save(run, saves, 1)
        saves.checkpointer._wait_for_pruning()
    run.close()
    return outcome.error, done


def test_files_are_synced_before_the_rename_and_that_before_the_hint(toy_corpus, tmp_path):
    """After a power cut a folder under its final name has all its bytes, the manifest's and its checksum's too."""
    config = _config(toy_corpus, tmp_path)
    error, done = on_ranks(1, _order_of_a_save, config)[0]
    assert error is None
    root = config.folder / "checkpoints"
    staging, final = root / ".step_00000001.tmp", root / "step_00000001"
    renamed = done.index(("rename", str(staging)))
    before, after = done[:renamed], done[renamed:]
    synced = {name: place for place, (kind, name) in enumerate(before) if kind == "fsync"}
    for path in final.iterdir():
        assert str(staging / path.name) in synced, f"{path.name} is not synced"
    manifest, sums = (synced[str(staging / name)] for name in ("manifest.json", "manifest.sha256"))
    shards = [synced[str(staging / path.name)] for path in final.iterdir() if not path.name.startswith("manifest")]
    assert max(shards) < min(manifest, sums) < max(manifest, sums) < synced[str(staging)]
    assert after.index(("fsync", str(root))) < next(
        place for place, (kind, name) in enumerate(after) if kind in ("rename", "replace") and "LATEST" in name
    )
    assert (config.folder / "LATEST").read_text() == "step_00000001\n"


def _chosen(changes):
    """Every change to the disk but those amid a shard, of which every fifteenth stands for its neighbours.

    With `MEGADIFF_EVERY_WRITE=1` those too, which takes a quarter of an hour.
    """
    if os.environ.get("MEGADIFF_EVERY_WRITE") == "1":
        return list(range(len(changes)))
    amid = [what.endswith("distcp") and "write" in what for what in changes]
    return [k for k, is_amid in enumerate(amid) if not is_amid or k % 15 == 0 or not all(amid[k - 1 : k + 2])]


def _saves_on_a_full_disk(config):
    """The disk fills at one change after another and stays full for that save; between, the run goes on."""
    run = wire_on_rank(config, 1)
    saves = _saves_of(run)
    old = [_step_and_save(run, saves, step) for step in (1, 2)][-1]
    before = {path.name: path.read_bytes() for path in old.folder.iterdir()}
    changes = []
    with watched_disk(changes.append):
        new = _step_and_save(run, saves, 3)
        saves.checkpointer._wait_for_pruning()
    said = {}
    for k in _chosen(changes):
        shutil.rmtree(new.folder, ignore_errors=True)
        (config.folder / "LATEST").write_text(old.folder.name + "\n")
        said[changes[k] + f" ({k})"] = _save_with_full_disk_from(k, run, saves)
        assert not list((config.folder / "checkpoints").glob(".*"))
        assert {path.name: path.read_bytes() for path in old.folder.iterdir()} == before
        newest = newest_complete(config.folder)
        assert newest in (old.folder, new.folder)  # after the rename it is there, whatever fails later
        verify_files(newest, hashes=True)
    last = _step_and_save(run, saves, 4)
    run.close()
    return said, new.error, last.error


def _save_with_full_disk_from(k, run, saves):
    count = [0]

    def fail(what):
        count[0] += 1
        if count[0] > k and not what.startswith(("unlink", "rmdir")):
            raise OSError(errno.ENOSPC, "No space left on device")

    with watched_disk(fail):
        outcome = _step_and_save(run, saves, 3)
        saves.checkpointer._wait_for_pruning()
    return outcome.error


@pytest.mark.timeout(3600)
def test_a_disk_that_fills_at_any_point_of_a_save_costs_that_save_alone(toy_corpus, tmp_path):
    config = _config(toy_corpus, tmp_path, checkpoint__keep=2)
    said, before, after = on_ranks(1, _saves_on_a_full_disk, config, timeout_s=3500)[0]
    print(f"{len(said)} points at which the disk filled")
    assert before is None
    assert after is None
    assert len(said) > 40
    wrong = {what: error for what, error in said.items() if error is None or "No space left on device" not in error}
    assert all(what.startswith(("unlink", "rmdir")) for what in wrong), wrong


def _train_with_failing_saves(config, failing):
    """Train for real; the saves of these steps fail."""

    def change(run):
        saver = _saves_of(run).checkpointer
        start = saver.start

        def start_and_maybe_fail(manifest, **settings):
            if manifest.step not in failing:
                return start(manifest, **settings)
            with watched_disk(_no_space):
                return start(manifest, **settings) or saver.finish()

        saver.start = start_and_maybe_fail

    try:
        train_on_rank(config, 1, save=True, change=change)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def _no_space(what):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_training_survives_a_failed_save_and_ends_after_three_in_a_row(toy_corpus, tmp_path):
    few = _config(toy_corpus, tmp_path, name="few", schedule__steps=12, checkpoint__every=2)
    many = _config(toy_corpus, tmp_path, name="many", schedule__steps=12, checkpoint__every=2)
    assert on_ranks(1, _train_with_failing_saves, few, {2, 4, 8})[0] == "trained"
    said = on_ranks(1, _train_with_failing_saves, many, {4, 6, 8})[0]
    assert said.startswith("StorageError: ")
    assert said.endswith("No space left on device; that is 3 consecutive saves, so the run ends")
    assert [line["step"] for line in read_metrics(few.folder / "metrics.jsonl")] == list(range(1, 13))
    assert newest_complete(few.folder).name == "step_00000012"
    assert newest_complete(many.folder).name == "step_00000002"


def test_the_background_write_gives_the_same_files_as_the_foreground(toy_corpus, tmp_path):
    """And training between snapshot and rename does not leak into it."""
    folders = []
    for is_async in (True, False):
        config = _config(
            toy_corpus,
            tmp_path,
            name=f"async-{is_async}",
            schedule__steps=6,
            checkpoint__every=2,
            checkpoint__keep=0,
            checkpoint__async=is_async,
        )
        on_ranks(1, _train_slowly_written, config)
        folders.append(config.folder / "checkpoints")
    for step in (2, 4, 6):
        names = [f"step_{step:08d}/__0_0.distcp", f"step_{step:08d}/common.pt"]
        assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


def _train_slowly_written(config):
    """Writes take long, so that steps pass while they run."""

    def slow(what):
        if what.startswith("open") and what.endswith("distcp"):
            time.sleep(0.2)

    with watched_disk(slow):
        train_on_rank(config, 1, save=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_real_full_file_system(toy_corpus, tmp_path):
    """A tmpfs that holds two checkpoints and no third: the run trains to its end, and says what was not saved."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=1500k none '{disk}' 2>/dev/null"):
        pytest.skip("this machine does not let a process mount a tmpfs")
    try:
        config = _config(toy_corpus, disk, model__hidden=64, schedule__steps=8, checkpoint__every=2)
        said = on_ranks(1, _train_with_failing_saves, config, ())[0]
        whole = newest_complete(config.folder)
        assert whole is not None
        verify_files(whole, hashes=True)
        assert said == "trained" or "No space left on device" in said, said
    finally:
        os.system(f"umount '{disk}'")
