"""A rank that hangs, however deeply, is named with its section in time, its stacks are kept, and the run ends."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import time

import pytest

from megadiff.supervision.status import Status, read_status, write_status
from tests.support.doomed import run_doomed, traces
from tests.support.machine_load import within

LIMIT_S, LATE_S = 1.0, 2.0


def sleep(watchdog):
    time.sleep(60)


def hold_the_interpreter_lock(watchdog):
    while True:  # the signal for the stacks ends a sleep
        ctypes.PyDLL(None).sleep(60)


def explode_a_regular_expression(watchdog):
    re.match(r"(a+)+$", "a" * 64 + "b")


def stop(watchdog):
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)  # woken for its stacks, it must not get away


HARMS = [sleep, hold_the_interpreter_lock, explode_a_regular_expression, stop]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_hanging_rank_is_named_in_time_with_its_stacks(harm, tmp_path):
    ended = run_doomed(tmp_path, 3, harm, harmed=1, gloo=True, limit_s=LIMIT_S)

    assert ended.seconds < within(LIMIT_S + LATE_S + 1.5), "stacks and kill included"
    assert -signal.SIGKILL in ended.exit_codes
    assert all(code not in (0, None) for code in ended.exit_codes)
    (line,) = ended.causes
    pid = ended.pids[1]
    assert re.match(
        rf"first cause: rank 1 \(\S+, pid {pid}\) stalled: in section step 3 at data for (\d\.\d) s \(limit 1 s\)", line
    ), line
    said = float(line.split(" for ")[1].split(" s ")[0])
    assert LIMIT_S <= said <= LIMIT_S + LATE_S
    assert ("state T (stopped)" in line) == (harm is stop)
    assert line in ended.log
    assert f"stacks of rank 1 ({os.uname().nodename}, pid {pid}):" in ended.log
    assert f"in {harm.__name__}" in ended.log
    stacks = (ended.launch.records / "rank-00001.stacks").read_text()
    assert f"in {harm.__name__}" in stacks
    assert traces(ended) == []


def test_the_line_comes_within_two_seconds_of_the_limit(tmp_path):
    run_doomed(tmp_path, 1, sleep, limit_s=LIMIT_S)

    harmed = float((tmp_path / "harm").read_text()) + time.time() - time.monotonic()
    verdict = next((tmp_path / "run" / "first_cause").glob("*/first_cause.txt"))
    assert LIMIT_S < verdict.stat().st_mtime - harmed < LIMIT_S + LATE_S


def wait_with_the_others(watchdog):
    watchdog.mark("reduce")
    time.sleep(60)


def test_without_a_culprit_the_line_says_so(tmp_path):
    ended = run_doomed(tmp_path, 2, wait_with_the_others, harmed=1)

    (line,) = ended.causes
    assert line.startswith("first cause: all 2 ranks stalled in the same place, a collective or the network: "), line
    assert "in section step 3 at reduce for " in line
    assert re.search(r"; state [SRD] \(.*of rank", line), line
    assert traces(ended) == []


def nested(watchdog):
    with watchdog.section("save", step=3, limit_s=2.0):
        time.sleep(1.4)
    time.sleep(0.7)
    with watchdog.section("scratch", step=3, limit_s=0.5):
        for _ in range(4):
            time.sleep(0.3)
            watchdog.beat()
        time.sleep(30)


def test_the_innermost_section_counts_and_the_outer_begins_anew(tmp_path):
    """1.4 s in a section of 2 s, 0.7 s in the outer one of 1 s, and beats of 0.3 s in one of 0.5 s are all in order."""
    ended = run_doomed(tmp_path, 1, nested, limit_s=1.0)

    (line,) = ended.causes
    assert "stalled: in section scratch 3 for" in line
    assert ended.seconds > 1.4 + 0.7 + 4 * 0.3 + 0.5


def test_the_status_of_this_launch_becomes_failed_with_exit_code_6(tmp_path):
    def write_then_sleep(watchdog):
        run_folder = tmp_path / "run"
        write_status(run_folder, Status.now("running", step=2, steps=4, launch=watchdog._launch.key))
        time.sleep(60)

    ended = run_doomed(tmp_path, 1, write_then_sleep)

    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.exit_code, status.step) == ("failed", 6, 2)
    assert status.reason in ended.causes[0]


def test_a_run_that_ends_well_leaves_nothing_and_says_nothing(tmp_path):
    ended = run_doomed(tmp_path, 3, None, gloo=True)

    assert ended.exit_codes == [0, 0, 0]
    assert (ended.stderr, ended.log) == ("", "")
    assert not (tmp_path / "run" / "first_cause").exists()
    assert traces(ended, within_s=0.5) == []


def lose_the_disk(watchdog):
    run_folder = watchdog._launch.run_folder
    run_folder.rename(run_folder.with_name("gone"))
    time.sleep(60)


def test_a_run_folder_that_is_gone_keeps_nobody_from_speaking_once(tmp_path):
    ended = run_doomed(tmp_path, 2, lose_the_disk, harmed=1)

    (line,) = ended.causes
    assert "rank 1 " in line
    assert not (tmp_path / "run").exists()
    assert traces(ended) == []


def kill_the_watcher(watchdog):
    watchdog._watcher.kill()
    watchdog._watcher.wait()
    with watchdog.section("step", step=4):
        time.sleep(60)


def test_a_watcher_that_was_killed_is_replaced(tmp_path):
    ended = run_doomed(tmp_path, 1, kill_the_watcher)

    assert "the watcher of rank 0 ended with -9; another is started" in ended.stderr
    assert "in section step 4 for" in ended.causes[0]
    assert traces(ended) == []


def test_accounts_are_kept_per_rank_and_attempt(tmp_path):
    ended = run_doomed(tmp_path, 2, stop, harmed=1)

    assert ended.launch.records.name.startswith("77-2-")
    accounts = [json.loads(path.read_text()) for path in sorted(ended.launch.records.glob("*.json"))]
    assert [(account["rank"], account["step"]) for account in accounts] == [(0, 3), (1, 3)]
    assert accounts[0]["state"] in ("S", "R", "D")
    assert accounts[1]["state"] == "T"
