"""Who holds a run folder is said truly, also by a file that a killed process has left."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from filelock import FileLock

from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig
from megadiff.run.folder import run_folder
from megadiff.supervision import process
from megadiff.supervision.launch import Holder
from tests.support.runs import toy_config


@pytest.fixture
def config(toy_corpus, tmp_path) -> RunConfig:
    return toy_config(toy_corpus, tmp_path)


@pytest.fixture
def gone() -> int:
    """The number of a process that was there and is not."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def _refused(config) -> str:
    with pytest.raises(ConfigError) as refusal, run_folder(config):
        pass
    return str(refusal.value)


def test_the_refusal_names_host_and_process(config):
    with run_folder(config):
        said = _refused(config)
    assert f"(it holds {config.folder / '.lock'}): pid {os.getpid()} on {os.uname().nodename}; stop it or wait" in said
    assert sorted(path.name for path in config.folder.iterdir() if "holder" in path.name) == [], "gone with the lock"
    with run_folder(config):
        pass


def test_a_holder_on_another_machine_is_not_looked_up_by_process_id(config, gone):
    config.folder.mkdir()
    with FileLock(config.folder / ".lock"):
        there = replace(Holder.this_process(), host="node7", machine="another boot", pid=gone)
        there.write(config.folder)
        assert not there.is_leaving
        assert f"pid {gone} on node7; stop it" in _refused(config)


@pytest.mark.parametrize("content", ["", "nonsense", "[1]", '{"pid": 7}', "[" * 3000, "\0" * 9000])
def test_a_damaged_note_costs_the_name_and_no_more(config, content):
    config.folder.mkdir()
    with FileLock(config.folder / ".lock"):
        (config.folder / ".lock.holder").write_text(content)
        assert f"`fuser {config.folder / '.lock'}` on its machine names it" in _refused(config)


def test_a_note_of_a_process_that_is_gone_is_waited_for_and_not_believed(config, gone, monkeypatch, caplog):
    """The lock may be with what the killed process had started; the note says who that was."""
    monkeypatch.setattr("megadiff.run.folder._LEAVING_S", 0.3)
    config.folder.mkdir()
    caplog.set_level(logging.INFO, logger="megadiff")
    monkeypatch.setattr(logging.getLogger("megadiff"), "propagate", True)
    with FileLock(config.folder / ".lock"):
        replace(Holder.this_process(), pid=gone, ticks=1).write(config.folder)
        said = _refused(config)
    assert f"pid {gone} on {os.uname().nodename}, which is gone, left it to a process that it had started" in said
    assert sum("waiting for an earlier launch to leave" in line for line in caplog.messages) == 1


def test_a_holder_whose_launcher_is_gone_is_leaving(gone):
    holder = Holder.this_process()
    assert not holder.is_leaving
    assert replace(holder, launcher_pid=gone, launcher_ticks=1).is_leaving
    assert not replace(holder, launcher_pid=os.getpid(), launcher_ticks=process.start_ticks(os.getpid())).is_leaving
    assert replace(holder, ticks=holder.ticks + 1).is_leaving, "another process of the same number"


def test_a_link_in_the_place_of_the_note_is_not_written_through(config, tmp_path):
    config.folder.mkdir()
    (tmp_path / "precious").write_text("kept")
    (config.folder / ".lock.holder").symlink_to(tmp_path / "precious")
    with run_folder(config):
        assert json.loads((config.folder / ".lock.holder").read_text())["pid"] == os.getpid()
    assert (tmp_path / "precious").read_text() == "kept"
