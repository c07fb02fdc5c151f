"""Damage to real checkpoints: what is half-written, cut, flipped or hostile is never taken for whole."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from unittest.mock import patch

import psutil
import pytest

from megadiff.checkpoint import store
from megadiff.checkpoint.manifest import FileEntry
from megadiff.errors import CheckpointError
from tests.checkpoint.test_manifest import manifest
from tests.checkpoint.test_safe_metadata import _Canary
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank, wire_on_rank

STEPS = (2, 4, 6)


def _saved_on_rank(config):
    train_on_rank(config, 1, save=True)
    return [process.name() for process in psutil.Process().children(recursive=True)]


@pytest.fixture(scope="module")
def original(toy_corpus, tmp_path_factory):
    """A run with three checkpoints, and its description."""
    config = toy_config(
        toy_corpus,
        tmp_path_factory.mktemp("store"),
        model__layers=1,
        data__valid=[],
        schedule__steps=STEPS[-1],
        checkpoint__every=2,
        checkpoint__keep=0,
    )
    children = on_ranks(1, _saved_on_rank, config)[0]
    return config, children


@pytest.fixture
def run(original, tmp_path):
    config, _ = original
    shutil.copytree(config.folder, tmp_path / "toy")
    return config.model_copy(update={"output_dir": str(tmp_path)})


def checkpoint(config, step):
    return config.folder / f"checkpoints/step_{step:08d}"


def shard_of(folder):
    return next(folder.glob("*.distcp"))


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


VISIBLE_AT_ONCE = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a cut manifest": lambda folder: os.truncate(folder / "manifest.json", 100),
    "a shard that is gone": lambda folder: shard_of(folder).unlink(),
    "a cut shard": lambda folder: os.truncate(shard_of(folder), 1000),
    "an empty index": lambda folder: os.truncate(folder / ".metadata", 0),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a staging folder": lambda folder: folder.rename(folder.with_name(f".{folder.name}.tmp")),
}


def test_three_checkpoints_were_written_and_the_newest_is_found(run):
    assert [checkpoint(run, step).is_dir() for step in STEPS] == [True] * 3
    assert store.newest_complete(run.folder) == checkpoint(run, 6)
    assert (run.folder / "LATEST").read_text() == "step_00000006\n"
    assert not list((run.folder / "checkpoints").glob(".*"))


def test_saving_leaves_no_process_behind(original):
    """A helper process would outlive a killed trainer for ever."""
    assert original[1] == []


@pytest.mark.parametrize("damage", VISIBLE_AT_ONCE)
def test_what_is_not_whole_is_passed_over_for_the_next_older(run, damage):
    VISIBLE_AT_ONCE[damage](checkpoint(run, 6))
    assert store.newest_complete(run.folder) == checkpoint(run, 4)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_unasked(run):
    for step in STEPS:
        VISIBLE_AT_ONCE["a cut shard"](checkpoint(run, step))
    with pytest.raises(CheckpointError, match=r"holds 3 checkpoint\(s\) and all are damaged .* move them away"):
        store.newest_complete(run.folder)
    assert store.newest_complete(run.folder / "nowhere") is None


def _loads(configs):
    """What resuming says of each folder, one after the other: an error, or the step it goes on from."""
    said = []
    for config in configs:
        try:
            run = wire_on_rank(config, 1)
            said.append(run.first_step)
            run.close()
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_a_flipped_byte_and_a_hostile_index_of_right_size_are_refused_on_load(run, tmp_path):
    """Sizes agree, so the folder looks complete; the checksums and the index's classes do not."""
    whole, flipped, hostile = (
        run.model_copy(update={"output_dir": str(tmp_path / name)}) for name in ("whole", "flipped", "hostile")
    )
    for copy in (whole, flipped, hostile):
        shutil.copytree(run.folder, copy.folder)
    _flip(shard_of(checkpoint(flipped, 6)))
    canary = tmp_path / "canary"
    index = checkpoint(hostile, 6) / ".metadata"
    index.write_bytes(pickle.dumps(_Canary(os.system, f"touch {canary}")))
    listed = json.loads((checkpoint(hostile, 6) / "manifest.json").read_text())
    listed["files"][".metadata"] = {"bytes": index.stat().st_size, "sha256": store._sha256(index)}
    (checkpoint(hostile, 6) / "manifest.json").write_text(json.dumps(listed))

    said = on_ranks(1, _loads, [whole, flipped, hostile])[0]

    assert said[0] == 6
    assert f"{shard_of(checkpoint(flipped, 6))} is damaged: its content has changed since it was written" in said[1]
    assert "is not a checkpoint index and was not loaded: it names posix.system" in said[2]
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", "link"])
def test_a_manifest_may_only_name_plain_files_beside_it(tmp_path, name):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"abc")
    (folder / "link").symlink_to(tmp_path / "outside")
    manifest(files={name: FileEntry(bytes=3, sha256="00")}).write(folder)
    with pytest.raises(CheckpointError, match=r"is damaged: .* is missing; take another checkpoint of the run"):
        store.verify_files(folder, hashes=False)


@pytest.mark.parametrize(("keep", "left"), [(0, STEPS), (1, (6,)), (2, (4, 6)), (5, STEPS)])
def test_pruning_keeps_the_newest_whole_ones_and_clears_what_a_killed_save_left(run, keep, left):
    (run.folder / "checkpoints/.step_00000008.tmp").mkdir()
    store.prune(run.folder, keep=keep)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [f"step_{s:08d}" for s in left]


def test_pruning_never_counts_a_damaged_one_as_kept(run):
    VISIBLE_AT_ONCE["a cut shard"](checkpoint(run, 6))
    store.prune(run.folder, keep=1)
    assert store.newest_complete(run.folder) == checkpoint(run, 4)
    assert not checkpoint(run, 2).exists()


def _save_then_load_hostile_state(config, command):
    """Save with a hostile object where a layer keeps its extra state, and load that."""
    from megadiff.model.denoiser import UnbiasedColumnLinear

    class Hostile(UnbiasedColumnLinear):
        def get_extra_state(self):
            return _Canary(os.system, command)

    with patch("megadiff.model.denoiser.UnbiasedColumnLinear", Hostile):
        train_on_rank(config, 1, save=True)
    return _loads([config])[0]


def test_a_hostile_object_inside_a_shard_is_refused_and_runs_nothing(toy_corpus, tmp_path):
    """torch's planner unpickles such objects without restraint (default_planner.py: weights_only=False)."""
    config = toy_config(toy_corpus, tmp_path, model__layers=1, data__valid=[], schedule__steps=4)
    said = on_ranks(1, _save_then_load_hostile_state, config, f"touch {tmp_path}/canary")[0]
    assert not (tmp_path / "canary").exists()
    assert said == "a shard holds an object of posix.system, no plain data, and was not loaded"
