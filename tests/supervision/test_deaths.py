"""A rank that dies takes the others with it within seconds, and the first cause is named once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from megadiff.errors import DataError
from megadiff.supervision.config import WatchdogConfig
from megadiff.supervision.launch import Launch
from megadiff.supervision.watchdog import Watchdog
from tests.support.doomed import run_doomed, traces
from tests.support.machine_load import within

ALL_ENDED_S = 5.0


def kill_itself(watchdog):
    os.kill(os.getpid(), signal.SIGKILL)


def segfault(watchdog):
    ctypes.string_at(0)


def abort(watchdog):
    os.abort()


def exit_without_farewell(watchdog):
    os._exit(9)


def raise_an_exception(watchdog):
    raise ValueError("no such sequence")


DEATHS = {
    kill_itself: (
        -signal.SIGKILL,
        r"died in section step 3 at data: killed by SIGKILL \(possibly by the kernel's out-of-mem",
    ),
    segfault: (-signal.SIGSEGV, "died in section step 3 at data: killed by SIGSEGV"),
    abort: (-signal.SIGABRT, "died in section step 3 at data: killed by SIGABRT"),
    exit_without_farewell: (9, "died in section step 3 at data: exit code 9"),
    raise_an_exception: (1, "raised in section step 3 at data: ValueError: no such sequence"),
}


@pytest.mark.parametrize("gloo", [True, False], ids=["peers notice", "peers hang"])
@pytest.mark.parametrize("harm", DEATHS, ids=lambda harm: harm.__name__)
def test_a_death_ends_every_rank_and_is_named_once(harm, gloo, tmp_path):
    exit_code, cause = DEATHS[harm]

    ended = run_doomed(tmp_path, 3, harm, harmed=2, gloo=gloo, limit_s=30)

    assert ended.seconds < within(ALL_ENDED_S)
    assert ended.exit_codes[2] == exit_code
    assert all(code not in (0, None) for code in ended.exit_codes)
    (line,) = ended.causes
    assert re.match(rf"first cause: rank 2 \(\S+, pid {ended.pids[2]}\) {cause}", line), line
    assert line in ended.log
    assert traces(ended) == []


def _shut_connections():
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.getpeername():  # one that listens has none
                connection.shutdown(socket.SHUT_RDWR)


def _lose_connections_and_die_after(seconds):
    def harm(watchdog):
        _shut_connections()
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    return harm


@pytest.mark.parametrize("seconds", [0.2, 1.2, 3.0])
def test_a_late_noticed_death_precedes_the_lost_connections_it_caused(seconds, tmp_path):
    """The kernel closes a dying process's connections before it shows the death, on a loaded machine long before."""
    ended = run_doomed(tmp_path, 3, _lose_connections_and_die_after(seconds), harmed=2, gloo=True, limit_s=30)

    (line,) = ended.causes
    assert line.startswith(f"first cause: rank 2 ({socket.gethostname()}, pid {ended.pids[2]}) died in section step 3")
    assert "killed by SIGKILL" in line
    assert traces(ended) == []


def test_lost_connections_are_named_once_every_rank_has_reported_one(tmp_path):
    ended = run_doomed(tmp_path, 3, lambda watchdog: _shut_connections(), harmed=2, gloo=True, limit_s=30)

    assert ended.seconds < within(ALL_ENDED_S)
    (line,) = ended.causes
    assert re.match(r"first cause: rank \d \(.*\) raised in section step 3 at reduce: RuntimeError: ", line), line
    assert traces(ended) == []


def test_a_crash_leaves_its_stack_in_the_log(tmp_path):
    ended = run_doomed(tmp_path, 1, segfault, limit_s=30)

    assert "Fatal Python error: Segmentation fault" in ended.log
    assert "in segfault" in ended.log
    assert len(ended.causes) == 1


def raise_what_the_user_can_mend(watchdog):
    raise DataError("the corpus is empty")


def test_a_users_mistake_on_one_rank_ends_those_that_hang(tmp_path):
    ended = run_doomed(tmp_path, 2, raise_what_the_user_can_mend, harmed=1, limit_s=30)

    assert ended.seconds < within(ALL_ENDED_S)
    assert ended.exit_codes == [-signal.SIGKILL, 1]
    assert "DataError: the corpus is empty" in ended.causes[0]


def test_a_users_mistake_alone_is_not_told_twice(tmp_path):
    ended = run_doomed(tmp_path, 1, raise_what_the_user_can_mend)

    assert ended.exit_codes == [1]
    assert ended.causes == []
    assert traces(ended) == []


def fork_a_sleeper_and_hang(watchdog):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(watchdog._launch.run_folder)])
    time.sleep(60)


def test_what_a_hanging_rank_has_started_ends_with_it(tmp_path):
    ended = run_doomed(tmp_path, 1, fork_a_sleeper_and_hang)

    assert ended.exit_codes == [-signal.SIGKILL]
    assert traces(ended) == []


def test_a_death_on_another_node_is_followed(tmp_path):
    """Two launches of one rank each see the same run folder but not each other's processes, as two nodes would."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    code = """
import sys, time
from pathlib import Path
from megadiff.supervision.config import WatchdogConfig
from megadiff.supervision.launch import Launch
from megadiff.supervision.watchdog import Watchdog
rank = int(sys.argv[2])
environ = {"MASTER_ADDR": "node0", "MASTER_PORT": "29512", "LOCAL_WORLD_SIZE": "1"}
launch = Launch.from_env(Path(sys.argv[1]), rank=rank, world_size=2, environ=environ)
Launch.node_folder = lambda self, made=Launch.node_folder: made(replace(self, key=f"{self.key}-{rank}"))
from dataclasses import replace
with Watchdog(WatchdogConfig(), launch) as watchdog, watchdog.section("step", step=1):
    print("in", flush=True)
    time.sleep(60)
"""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(run_folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "in\n"
    time.sleep(0.5)  # both watchers look
    start = time.monotonic()
    ranks[1].kill()
    outputs = [rank.communicate(timeout=100)[1] for rank in ranks]

    assert time.monotonic() - start < ALL_ENDED_S + 0.5
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 2
    assert sum(text.count("first cause: rank 1 ") for text in outputs) == 1


def test_the_start_of_a_watcher_is_cheap_and_a_mark_almost_free(tmp_path):
    launch = Launch.from_env(tmp_path, rank=0, world_size=1, environ={})
    watchdog = Watchdog(WatchdogConfig(), launch)
    start = time.monotonic()
    watchdog.start()
    started_s = time.monotonic() - start
    with watchdog.section("step", step=1):
        start = time.monotonic()
        for _ in range(10_000):
            watchdog.mark("reduce")
        mark_s = (time.monotonic() - start) / 10_000
    watchdog.stop()

    assert started_s < 1.0
    assert mark_s < 50e-6, "measured 2e-6"


def test_a_disabled_watchdog_does_nothing(tmp_path):
    launch = Launch.from_env(tmp_path, rank=0, world_size=1, environ={})
    with Watchdog(WatchdogConfig(enabled=False), launch) as watchdog, watchdog.section("step", step=1):
        watchdog.mark("data")
        watchdog.beat()

    assert watchdog._watcher is None
