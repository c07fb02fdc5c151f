"""One rank's trouble is said as such: it gives up no checkpoint, hangs no other rank, and is worth another try."""

from __future__ import annotations

import errno
import os
import time
from unittest.mock import patch

import pytest

from megadiff.checkpoint import folder as folders
from megadiff.checkpoint.manifest import FileEntry
from megadiff.checkpoint.save import HostBuffers
from megadiff.errors import MegadiffError
from tests.support.ranks import on_ranks
from tests.support.runs import read_metrics, toy_config, train_on_rank, wire_on_rank
from tests.support.whole_runs import Ranks, status


def _config(corpus, output, **changes):
    base = {"model__layers": 1, "data__valid": [], "parallel__tensor": 2, "schedule__steps": 6, "checkpoint__every": 2}
    return toy_config(corpus, output, **{**base, **changes})


def _train(config):
    train_on_rank(config, 2, save=True)


def _resume_where_one_rank_cannot_read(config, what):
    """Rank 1 meets this whenever it hashes a file."""
    rank = int(os.environ["RANK"])

    def sick(path):
        if what == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return FileEntry(bytes=path.stat().st_size, sha256="0" * 64)

    with patch.object(folders, "entry_of", sick if rank == 1 else folders.entry_of):
        try:
            wire_on_rank(config, 2).close()
        except MegadiffError as error:
            return type(error).__name__, str(error)
    return "went on", ""


@pytest.mark.parametrize(("what", "said"), [("error", "reading failed"), ("other bytes", "since it was written")])
def test_a_rank_that_cannot_read_gives_no_checkpoint_up(toy_corpus, tmp_path, what, said):
    config = _config(toy_corpus, tmp_path)
    on_ranks(2, _train, config)
    before = sorted(path.name for path in (config.folder / "checkpoints").iterdir())
    for kind, sentence in on_ranks(2, _resume_where_one_rank_cannot_read, config, what):
        assert kind == "StorageError"
        assert sentence.startswith("rank 1 on ")
        assert said in sentence
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == before
    assert on_ranks(2, _first_step, config) == [6, 6]


def _first_step(config):
    run = wire_on_rank(config, 2)
    run.close()
    return run.first_step


def _train_where_one_rank_has_no_memory_once(config):
    copy, calls = HostBuffers.copy, []

    def without_memory(self, place, tensor):
        calls.append(place)
        if os.environ["RANK"] == "1" and len(calls) == 1:
            raise RuntimeError("CUDA error: out of memory while pinning")
        return copy(self, place, tensor)

    with patch.object(HostBuffers, "copy", without_memory):
        train_on_rank(config, 2, save=True)


def test_a_snapshot_failing_on_one_rank_is_dropped_by_all(toy_corpus, tmp_path):
    config = _config(toy_corpus, tmp_path)
    on_ranks(2, _train_where_one_rank_has_no_memory_once, config, timeout_s=300)
    assert sorted(path.name for path in (config.folder / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    assert len(read_metrics(config.folder / "metrics.jsonl")) == 6


def test_what_a_killed_deletion_leaves_goes_with_the_next_pruning(tmp_path):
    root = tmp_path / "checkpoints"
    for step in (2, 4):
        (root / f"step_{step:08d}").mkdir(parents=True)
    (root / "step_00000002/__0_0.distcp").write_bytes(b"left")
    with patch.object(folders, "is_complete", lambda folder: folder.name != "step_00000002"):
        (root / "step_00000006").mkdir()
        folders.prune(tmp_path, keep=2)
    assert sorted(path.name for path in root.iterdir()) == ["step_00000004", "step_00000006"]


def test_a_folder_that_holds_the_checkpoint_of_another_step_is_damaged(toy_corpus, tmp_path):
    config = _config(toy_corpus, tmp_path)
    on_ranks(2, _train, config)
    root = config.folder / "checkpoints"
    (root / "step_00000006").rename(root / "step_00000008")
    assert folders.newest_complete(config.folder) == root / "step_00000004"


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "LATEST"])
def test_a_pipe_in_place_of_a_file_holds_nobody_up(toy_corpus, tmp_path, name):
    config = _config(toy_corpus, tmp_path, parallel__tensor=1)
    on_ranks(1, train_on_rank, config, 1, save=True)
    folder = config.folder if name == "LATEST" else config.folder / "checkpoints/step_00000006"
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert folders.newest_complete(config.folder).name == ("step_00000006" if name == "LATEST" else "step_00000004")


def _status_of(config, ranks, codes):
    launched = Ranks(config, ranks)
    assert launched.end(within_s=120) == codes, launched.said(0)
    return status(config.folder)


def test_a_run_that_is_refused_says_so_to_the_scheduler(toy_corpus, tmp_path):
    config = _config(toy_corpus, tmp_path)
    assert _status_of(config, 2, [0, 0])["state"] == "finished"
    said = _status_of(config.model_copy(update={"seed": 4}), 2, [2, 2])
    assert (said["state"], said["exit_code"], said["step"]) == ("no_restart", 2, 6)
    assert "seed: 3 -> 4" in said["reason"]


def test_a_last_save_without_space_may_be_tried_again(toy_corpus, tmp_path):
    config = _config(toy_corpus, tmp_path, schedule__steps=3, checkpoint__every=2)

    def no_space(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch("megadiff.checkpoint.save.Snapshot.write", no_space):
        said = _status_of(config, 2, [1, 1])
    assert (said["state"], said["exit_code"], said["step"]) == ("failed", 1, 2)
    assert "No space left on device" in said["reason"]
    assert _status_of(config, 2, [0, 0])["state"] == "finished"


def test_a_non_finite_run_stays_down_however_long_closing_takes(toy_corpus, tmp_path):
    config = _config(toy_corpus, tmp_path, optimizer__lr=1e30, optimizer__clip_grad=0.0, schedule__warmup_steps=0)

    def slow(self):
        time.sleep(3.5 if os.environ["RANK"] == "0" else 0.0)

    with patch("megadiff.train.loop.Trainer.close", slow):
        launched = Ranks(config, 2)
        assert 5 in launched.end(within_s=120), launched.said(0)
    said = status(config.folder)
    assert (said["state"], said["exit_code"]) == ("no_restart", 5)
