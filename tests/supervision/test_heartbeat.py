"""What one process writes another reads, whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadiff.supervision import process
from megadiff.supervision.config import WatchdogConfig
from megadiff.supervision.heartbeat import FAILED, NOWHERE, Heartbeat, Place
from megadiff.supervision.launch import Launch
from megadiff.supervision.watchdog import Watchdog


def test_a_place_is_read_as_it_was_written(tmp_path):
    mine = Heartbeat.create(tmp_path / "rank-00003.beat", 3)
    seen = Heartbeat.open(tmp_path / "rank-00003.beat")

    assert (seen.rank, seen.pid, seen.ticks) == (3, os.getpid(), process.start_ticks(os.getpid()))
    assert seen.place() == Place("", "", 0, 0, 0.0, 0.0)
    mine.write(12.5, 30.0, 17, 4, b"step", b"reduce")
    assert seen.place() == Place("step", "reduce", 17, 4, 12.5, 30.0)
    assert seen.place().describe() == "section step 17 at reduce"
    assert NOWHERE.describe() == "no section"
    assert oct((tmp_path / "rank-00003.beat").stat().st_mode & 0o777) == "0o600"


def test_names_longer_than_their_place_are_cut(tmp_path):
    beat = Heartbeat.create(tmp_path / "rank-00000.beat", 0)
    beat.write(0.0, 1.0, 1, 0, b"s" * 100, b"m" * 100)
    beat.leave(FAILED, "é" * 2000)
    beat.set_cause("x" * 5000)
    assert beat.place() == Place("s" * 32, "m" * 48, 1, 0, 0.0, 1.0)
    assert beat.life()[0] == FAILED
    assert len(beat.verdict()) == 999


@pytest.mark.parametrize("content", [b"", b"x" * 4096, b"MDBEAT01"], ids=["empty", "other", "short"])
def test_a_file_that_is_no_heartbeat_is_refused(content, tmp_path):
    (tmp_path / "rank-00000.beat").write_bytes(content)
    with pytest.raises(ValueError, match="not a heartbeat file"):
        Heartbeat.open(tmp_path / "rank-00000.beat")


def test_a_link_is_not_followed(tmp_path):
    Heartbeat.create(tmp_path / "rank-00000.beat", 0)
    (tmp_path / "rank-00001.beat").symlink_to(tmp_path / "rank-00000.beat")
    with pytest.raises(OSError, match="symbolic links"):
        Heartbeat.open(tmp_path / "rank-00001.beat")


def test_marks_are_counted_anew_in_every_step(tmp_path):
    watchdog = Watchdog(WatchdogConfig(enabled=False), Launch.from_env(tmp_path, rank=0, world_size=1, environ={}))
    seen = []
    for step in (1, 2):
        with watchdog.section("step", step=step):
            watchdog.mark("data")
            with watchdog.section("save", step=step):
                seen.append(watchdog._beat.place())
            watchdog.mark("agree")
            seen.append(watchdog._beat.place())
    assert [(place.section, place.mark, place.order) for place in seen] == [
        ("save", "", (1, 2)),
        ("step", "agree", (1, 4)),
        ("save", "", (2, 2)),
        ("step", "agree", (2, 4)),
    ]


def test_a_process_is_known_by_pid_and_start():
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(3)"], stdin=subprocess.PIPE)
    ticks = process.start_ticks(child.pid)
    assert process.is_alive(child.pid, ticks)
    assert not process.is_alive(child.pid, ticks + 1)
    assert child.pid in process.descendants(os.getpid())
    fd = process.open_pidfd(child.pid)
    assert child.stdin is not None
    child.stdin.close()
    if fd is not None:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        os.close(fd)
    assert not process.is_alive(child.pid, ticks)
    assert process.how_it_ended(child.pid, ticks) == "exit code 3"
    child.wait()
    assert process.state(child.pid) == ""
    assert process.how_it_ended(child.pid, ticks) == ""
    assert not Path(f"/proc/{child.pid}").exists()
