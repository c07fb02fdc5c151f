"""Damage to real checkpoints: what is half-written, cut, flipped or hostile is never taken for whole."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from pydantic import ValidationError

from megadiff.checkpoint import folder as folders
from megadiff.checkpoint.folder import entry_of
from megadiff.checkpoint.manifest import FileEntry, Manifest, read_manifest
from megadiff.config.load import dump_config
from megadiff.errors import CheckpointError, StorageError
from megadiff.run.config import CheckpointConfig
from tests.checkpoint.conftest import STEPS, checkpoint, shard_of
from tests.checkpoint.test_manifest import manifest
from tests.checkpoint.test_safe_metadata import _Canary
from tests.support.disk import watched_disk
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank, wire_on_rank


def _flip(path, bit=None):
    data = bytearray(path.read_bytes())
    bit = len(data) * 4 if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


VISIBLE_AT_ONCE = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no checksum of the manifest": lambda folder: (folder / "manifest.sha256").unlink(),
    "a cut manifest": lambda folder: os.truncate(folder / "manifest.json", 100),
    "a flipped bit in the manifest": lambda folder: _flip(folder / "manifest.json"),
    "a shard that is gone": lambda folder: shard_of(folder).unlink(),
    "a cut shard": lambda folder: os.truncate(shard_of(folder), 1000),
    "an empty index": lambda folder: os.truncate(folder / ".metadata", 0),
    "a file too many": lambda folder: (folder / "__9_0.distcp").write_bytes(b"?"),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a staging folder": lambda folder: folder.rename(folder.with_name(f".{folder.name}.tmp")),
}


def test_three_checkpoints_were_written_and_the_newest_is_found(run):
    assert [checkpoint(run, step).is_dir() for step in STEPS] == [True] * 3
    assert folders.newest_complete(run.folder) == checkpoint(run, 6)
    assert (run.folder / "LATEST").read_text() == "step_00000006\n"
    assert not list((run.folder / "checkpoints").glob(".*"))


def test_saving_leaves_no_process_behind(original):
    """A helper process would outlive a killed trainer for ever."""
    assert original[1] == []


@pytest.mark.parametrize("damage", VISIBLE_AT_ONCE)
def test_what_is_not_whole_is_passed_over_for_the_next_older(run, damage, monkeypatch):
    monkeypatch.setattr(folders, "_PAUSE_S", 0.0)
    VISIBLE_AT_ONCE[damage](checkpoint(run, 6))
    assert folders.newest_complete(run.folder) == checkpoint(run, 4)


@pytest.mark.parametrize("hint", [None, "", "step_00000002\n", "nonsense \x00", "../../etc", "step_00000009\n"])
def test_latest_is_a_hint_and_not_the_truth(run, hint, monkeypatch):
    monkeypatch.setattr(folders, "_PAUSE_S", 0.0)
    (run.folder / "LATEST").unlink()
    if hint is not None:
        (run.folder / "LATEST").write_text(hint)
    assert folders.newest_complete(run.folder) == checkpoint(run, 6)


def test_a_newer_checkpoint_that_is_gone_is_named(run):
    newest = checkpoint(run, 6)
    assert folders.lost_since(run.folder, newest) is None
    (run.folder / "LATEST").write_text("step_00000009\n")
    assert "LATEST names the checkpoint of step 9, which is not in" in folders.lost_since(run.folder, newest)
    assert folders.lost_since(run.folder, newest).endswith("goes on from step 6")
    shutil.copytree(newest, newest.with_name("step_00000009.bad"))
    assert folders.lost_since(run.folder, newest) is None, "it was set aside, which was said then"


def test_a_rename_that_a_network_file_system_shows_late_is_waited_for(run, monkeypatch):
    hidden = checkpoint(run, 6).rename(run.folder / "elsewhere")
    monkeypatch.setattr(folders.time, "sleep", lambda _: hidden.rename(checkpoint(run, 6)))
    assert folders.newest_complete(run.folder) == checkpoint(run, 6)


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(run):
    for step in STEPS:
        VISIBLE_AT_ONCE["a cut shard"](checkpoint(run, step))
    with pytest.raises(CheckpointError, match=r"holds 3 checkpoint\(s\) and all are damaged .* move them away"):
        folders.newest_complete(run.folder)
    for step in STEPS:
        folders.set_aside(checkpoint(run, step))
    with pytest.raises(CheckpointError, match=r"holds 3 checkpoint\(s\) .* \(the newest is step_00000006\.bad\)"):
        folders.newest_complete(run.folder)
    assert folders.newest_complete(run.folder / "nowhere") is None


def test_setting_aside_never_overwrites_what_was_set_aside_before(run):
    first = folders.set_aside(checkpoint(run, 6))
    shutil.copytree(checkpoint(run, 4), checkpoint(run, 6))
    second = folders.set_aside(checkpoint(run, 6))
    assert (first.name, second.name) == ("step_00000006.bad", "step_00000006.bad.2")
    assert folders.newest_complete(run.folder) == checkpoint(run, 4)


def test_no_flipped_bit_of_any_file_is_accepted(run):
    """A thousand single bits, every file's share at least fifty."""
    draw = random.Random(0)
    folder = checkpoint(run, 6)
    files = sorted(folder.iterdir())
    assert {path.name for path in files} >= {".metadata", "common.pt", "manifest.json", "manifest.sha256"}
    for number in range(1000):
        path = files[number % len(files)]
        bit = draw.randrange(path.stat().st_size * 8)
        _flip(path, bit)
        with pytest.raises(CheckpointError, match=r"is damaged|has format|\.json is damaged"):
            folders.verify_files(folder, hashes=True)
        _flip(path, bit)
    folders.verify_files(folder, hashes=True)


def test_ranks_share_the_reading_and_leave_nothing_out(run):
    folder = checkpoint(run, 6)
    _flip(shard_of(folder))

    def says(share):
        try:
            folders.verify_files(folder, hashes=True, share=share, of=3)
        except CheckpointError:
            return "damaged"
        return "whole"

    assert sorted(says(share) for share in range(3)) == ["damaged", "whole", "whole"]


def loads(configs, **resume_options):
    """What resuming says of each folder, one after the other: an error, or the step it goes on from."""
    from megadiff.run.resume import ResumeOptions

    said = []
    for config in configs:
        try:
            run = wire_on_rank(config, 1, ResumeOptions(**resume_options))
            said.append(run.first_step)
            run.close()
        except CheckpointError as error:
            said.append(str(error))
    return said


def _relist(folder, name):
    """Make the manifest agree with a file that was changed."""
    listed = read_manifest(folder)
    listed.model_copy(update={"files": {**listed.files, name: entry_of(folder / name)}}).write(folder)


def test_a_damaged_checkpoint_is_set_aside_and_the_next_older_taken(run, tmp_path):
    """Sizes agree, so the folder looks complete; the hashes, or the index's classes, do not."""
    flipped, hostile, strict = (
        run.model_copy(update={"output_dir": str(tmp_path / name)}) for name in ("flipped", "hostile", "strict")
    )
    for copy in (flipped, hostile, strict):
        shutil.copytree(run.folder, copy.folder)
    _flip(shard_of(checkpoint(flipped, 6)))
    _flip(shard_of(checkpoint(strict, 6)))
    canary = tmp_path / "canary"
    (checkpoint(hostile, 6) / ".metadata").write_bytes(pickle.dumps(_Canary(os.system, f"touch {canary}")))
    _relist(checkpoint(hostile, 6), ".metadata")

    assert on_ranks(1, loads, [run, flipped, hostile])[0] == [6, 4, 4]

    for config in (flipped, hostile):
        names = sorted(path.name for path in (config.folder / "checkpoints").iterdir())
        assert names == ["step_00000002", "step_00000004", "step_00000006.bad"]
    assert not canary.exists()
    said = on_ranks(1, loads, [strict], strict=True)[0][0]
    assert f"{shard_of(checkpoint(strict, 6))} is damaged: its content has changed since it was written" in said
    assert said.endswith("--strict-resume takes no older checkpoint; omit it to resume from one")


def _resume_where_nothing_is_renamed(config):
    """What resuming says where the disk still shows a folder under the name that was taken from it."""
    with patch("megadiff.checkpoint.load.set_aside", side_effect=lambda folder: folder.with_suffix(".bad")) as renamed:
        try:
            wire_on_rank(config, 1)
        except StorageError as error:
            return renamed.call_count, str(error)
    return renamed.call_count, "resumed"


def test_a_damaged_checkpoint_that_stays_where_it_is_ends_the_attempt(run):
    _flip(shard_of(checkpoint(run, 6)))
    calls, said = on_ranks(1, _resume_where_nothing_is_renamed, run, timeout_s=300)[0]
    assert calls == 1
    assert said.endswith(
        f"it was set aside, but {checkpoint(run, 6)} is still there; check the disk, move that folder away and run "
        "the same command again"
    )


def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_previous(run, tmp_path):
    """By the command, twice: the damaged one is named and kept once, and the run ends as if nothing had been."""
    _flip(shard_of(checkpoint(run, 6)))
    path = tmp_path / "toy.yaml"
    path.write_text(dump_config(run))
    for resumed_from in (4, 6):
        ended = call_forked("pretrain_dlm.py", "--config", path)
        assert ended.code == 0, ended.err
        assert f"after step {resumed_from} of 6" in ended.out + ended.err
        names = sorted(found.name for found in (run.folder / "checkpoints").iterdir())
        assert names == ["step_00000002", "step_00000004", "step_00000006", "step_00000006.bad"]


def test_no_checkpoint_of_another_run_is_renamed(run, tmp_path):
    """`start_from` names a folder that is not ours: damage there is an error."""
    _flip(shard_of(checkpoint(run, 6)))
    branch = run.model_copy(
        update={
            "name": "branch",
            "checkpoint": run.checkpoint.model_copy(update={"start_from": str(checkpoint(run, 6))}),
        }
    )
    said = on_ranks(1, loads, [branch])[0][0]
    assert "is damaged: its content has changed" in said
    assert checkpoint(run, 6).is_dir()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", "link", "manifest.json"])
def test_a_manifest_may_only_name_plain_files_beside_it(tmp_path, name):
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"abc")
    if name == "link":
        (folder / "link").symlink_to(tmp_path / "outside")
    manifest(files={name: FileEntry(bytes=3, sha256="00")}).write(folder)
    with pytest.raises(CheckpointError, match=r"is damaged: .* is missing; take another|holds 'link', which is a link"):
        folders.verify_files(folder, hashes=False)


@pytest.mark.parametrize(("keep", "left"), [(0, STEPS), (1, (4, 6)), (2, (4, 6)), (5, STEPS)])
def test_pruning_keeps_the_newest_whole_ones(run, keep, left):
    folders.prune(run.folder, keep=keep)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [f"step_{s:08d}" for s in left]


def test_a_run_cannot_keep_a_single_checkpoint():
    with pytest.raises(ValidationError, match=r"keep must be 0 \(all\) or at least 2: a single checkpoint may prove"):
        CheckpointConfig.model_validate({"keep": 1})
    assert [CheckpointConfig(keep=keep).keep for keep in (0, 2)] == [0, 2]


def test_a_deletion_begins_with_the_manifest(run):
    """A deletion that is killed leaves a folder that nobody takes for a checkpoint."""
    done = []
    with watched_disk(done.append):
        folders.delete(checkpoint(run, 2))
    changes = [what.split() for what in done if what.startswith(("unlink", "remove", "rmdir", "rename"))]
    assert changes[0] == ["unlink", "manifest.json"]
    assert len(changes) > 4
    assert not checkpoint(run, 2).exists()


def test_pruning_never_counts_a_damaged_one_as_kept(run):
    VISIBLE_AT_ONCE["a cut shard"](checkpoint(run, 6))
    folders.prune(run.folder, keep=2)
    assert folders.newest_complete(run.folder) == checkpoint(run, 4)
    assert checkpoint(run, 2).exists()


def test_pruning_and_clearing_touch_nothing_outside(run, tmp_path):
    outside = tmp_path / "precious"
    shutil.copytree(checkpoint(run, 6), outside)
    root = run.folder / "checkpoints"
    shutil.rmtree(checkpoint(run, 2))
    checkpoint(run, 2).symlink_to(outside)
    (root / ".step_00000008.tmp").symlink_to(outside)
    (root / ".step_00000009.tmp").mkdir()
    (root / "notes").mkdir()
    folders.prune(run.folder, keep=2)
    folders.clear_staging(run.folder)
    assert len(list(outside.iterdir())) == len(list(checkpoint(run, 6).iterdir()))
    assert (root / "notes").is_dir()
    assert not (root / ".step_00000009.tmp").exists()


def _save_then_load_hostile_state(config, command):
    """Save with a hostile object where a layer keeps its extra state, and load that."""
    from megadiff.model.layers import ColumnLinear

    class Hostile(ColumnLinear):
        def get_extra_state(self):
            return _Canary(os.system, command)

    with patch("megadiff.model.layers.ColumnLinear", Hostile):
        train_on_rank(config, 1, save=True)
    return loads([config])[0]


def test_a_hostile_object_inside_a_shard_is_refused_and_runs_nothing(toy_corpus, tmp_path):
    """torch's planner unpickles such objects without restraint (default_planner.py: weights_only=False)."""
    config = toy_config(toy_corpus, tmp_path, model__layers=1, data__valid=[], schedule__steps=4)
    said = on_ranks(1, _save_then_load_hostile_state, config, f"touch {tmp_path}/canary")[0]
    assert not (tmp_path / "canary").exists()
    assert said == "a shard holds an object of posix.system, no plain data, and was not loaded"


def test_a_manifest_of_the_first_format_is_refused_by_number(run):
    """Fixtures of every past format stay: format 1 had no checksum of its own."""
    folder = checkpoint(run, 6)
    old = json.loads((folder / "manifest.json").read_text()) | {"format": 1}
    (folder / "manifest.json").write_text(json.dumps(old))
    (folder / "manifest.sha256").unlink()
    with pytest.raises(CheckpointError, match="has format 1, this version reads 6; use the megadiff version"):
        read_manifest(Path(folder))


def test_every_file_is_listed_with_what_is_read_back(run):
    folder = checkpoint(run, 6)
    listed: Manifest = read_manifest(folder)
    assert set(listed.files) == {path.name for path in folder.iterdir()} - {"manifest.json", "manifest.sha256"}
    assert all(entry_of(folder / name) == entry for name, entry in listed.files.items())


def test_check_reports_what_the_run_would_resume_from_or_the_refusal(run):
    """So that a scheduler's first look finds it, before a thousand ranks are started."""
    from megadiff.run.check import check
    from megadiff.run.resume import ResumeOptions

    said = check(run, ranks=1)
    assert f"resumes from      {checkpoint(run, 6)} after step 6 of 6" in said
    with pytest.raises(CheckpointError, match=r"seed: 3 -> 4.*--allow-change seed"):
        check(run.model_copy(update={"seed": 4}), ranks=1)
    allowed = check(run.model_copy(update={"seed": 4}), ranks=1, resume_options=ResumeOptions(allowed=["seed"]))
    assert "changed since     seed: 3 -> 4" in allowed
