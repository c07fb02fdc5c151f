"""Every way to ask a run to stop, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megadiff.errors import ConfigError
from megadiff.supervision.config import StopConfig
from megadiff.supervision.stopping import StopRequest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys, time
from pathlib import Path
from megadiff.supervision.config import StopConfig
from megadiff.supervision.stopping import StopRequest
with StopRequest(StopConfig(), Path(sys.argv[1]), is_main=True) as stop:
    print("open", flush=True)
    {body}
"""
UNTIL_ASKED = (
    "while stop.reason() is None: time.sleep(0.01)\n    print(stop.reason(), flush=True)\n    time.sleep({more})"
)


def program(folder: Path, body: str, **environ: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body), str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert said(process) == "open"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_is_a_request(name, tmp_path):
    process = program(tmp_path, UNTIL_ASKED.format(more=0))
    process.send_signal(signal.Signals[name])
    assert said(process) == name
    assert process.communicate(timeout=50) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_second_signal_leaves_at_once_unless_it_is_the_same_request(name, code, tmp_path):
    """The main thread is in C code, as in a collective; within two seconds the signal is taken for a duplicate."""
    process = program(tmp_path, UNTIL_ASKED.format(more=60))
    process.send_signal(signal.Signals[name])
    assert said(process) == name
    for _ in range(3):
        process.send_signal(signal.Signals[name])
        time.sleep(0.1)
    assert process.poll() is None
    time.sleep(2.0)
    process.send_signal(signal.Signals[name])
    start = time.monotonic()
    out, err = process.communicate(timeout=50)
    assert time.monotonic() - start < 1.0
    assert (process.returncode, out, err) == (code, "", f"second {name}: leaving at once, without a checkpoint\n")


def test_a_signal_counts_while_the_main_thread_is_in_c_code(tmp_path):
    body = """
    import threading
    def watch():
        while stop.reason() is None: time.sleep(0.01)
        print(stop.reason(), flush=True)
        os._exit(0)
    threading.Thread(target=watch).start()
    import ctypes; ctypes.CDLL(None).pause()  # a system call that a signal interrupts; so:
    while True: threading.Event().wait(60)
    """
    process = program(tmp_path, body)
    process.send_signal(signal.SIGTERM)
    assert said(process) == "SIGTERM"
    process.communicate(timeout=50)


def test_a_signal_during_the_search_for_the_stop_file_is_kept(tmp_path, monkeypatch):
    """The look at a shared disk may take long, and lets the listening thread run."""
    stop = StopRequest(StopConfig(), tmp_path, is_main=True)

    def slow_look(path):
        stop._hear(signal.SIGUSR2)
        return False

    monkeypatch.setattr("megadiff.supervision.stopping.os.path.lexists", slow_look)
    assert stop.reason() == "SIGUSR2"


def test_usr2_may_be_repeated_and_a_term_after_it_is_the_first(tmp_path):
    process = program(tmp_path, UNTIL_ASKED.format(more=4))
    process.send_signal(signal.SIGUSR2)
    assert said(process) == "SIGUSR2"
    time.sleep(2.2)
    process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=50)
    assert process.returncode == 0


def test_the_stop_file_is_seen_and_consumed(tmp_path):
    process = program(tmp_path, UNTIL_ASKED.format(more=0) + "\n    stop.honoured()")
    (tmp_path / "STOP").touch()
    assert said(process) == f"stop file {tmp_path / 'STOP'}"
    process.communicate(timeout=50)
    assert not (tmp_path / "STOP").exists()


def test_a_stop_file_from_before_the_start_is_refused(tmp_path):
    (tmp_path / "HALT").touch()
    with pytest.raises(ConfigError, match=r"HALT would stop this run before its first step; remove it"):
        StopRequest(StopConfig(file="HALT"), tmp_path, is_main=False)


def test_only_the_main_rank_looks_for_the_stop_file(tmp_path):
    stop = StopRequest(StopConfig(), tmp_path, is_main=False)
    (tmp_path / "STOP").touch()
    assert stop.reason() is None
    stop.honoured()
    assert (tmp_path / "STOP").exists()


def test_the_end_of_the_job_stops_the_run_ahead_of_it(tmp_path):
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 120)}
    near = StopRequest(StopConfig(grace_period_s=121), tmp_path, is_main=False, environ=end)
    far = StopRequest(StopConfig(grace_period_s=60), tmp_path, is_main=False, environ=end)
    assert near.reason() in (
        "time limit: 119 s left of SLURM_JOB_END_TIME",
        "time limit: 120 s left of SLURM_JOB_END_TIME",
    )
    assert far.reason() is None


@pytest.mark.parametrize("days", [-400, 400])
def test_a_jump_of_the_clock_changes_nothing(days, tmp_path, monkeypatch):
    wall, monotonic, passed = time.time(), time.monotonic, [0.0]
    stop = StopRequest(
        StopConfig(grace_period_s=60), tmp_path, is_main=False, environ={"SLURM_JOB_END_TIME": str(int(wall) + 100)}
    )
    monkeypatch.setattr(time, "time", lambda: wall + days * 86400)
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + passed[0])
    assert stop.reason() is None
    passed[0] = 42
    assert str(stop.reason()).startswith("time limit: 5")


@pytest.mark.parametrize("end", ["", "NONE", "1000000000"], ids=["empty", "not a number", "long ago"])
def test_an_end_of_the_job_that_cannot_be_is_ignored(end, tmp_path, caplog):
    stop = StopRequest(StopConfig(), tmp_path, is_main=False, environ={"SLURM_JOB_END_TIME": end})
    assert stop.reason() is None


def test_the_handlers_are_put_back(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest(StopConfig(), tmp_path, is_main=False) as stop:
        assert [signal.getsignal(number) for number in numbers] != before
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.2)
    assert [signal.getsignal(number) for number in numbers] == before
    assert stop.reason() == "SIGUSR2"


def test_a_forked_workers_signals_are_not_the_ranks(tmp_path):
    """INT and USR2, sent to the whole group, leave the worker at work; TERM ends it; the rank hears of none."""
    body = """
    worker = os.fork()
    if not worker:
        time.sleep(60)
    time.sleep(0.2)
    import signal
    for number in (signal.SIGINT, signal.SIGUSR2):
        os.kill(worker, number)
    time.sleep(0.2)
    print(os.waitpid(worker, os.WNOHANG)[0], flush=True)
    os.kill(worker, signal.SIGTERM)
    print(os.waitpid(worker, 0)[1], stop.reason(), flush=True)
    """
    process = program(tmp_path, body)
    assert said(process) == "0"
    assert said(process) == f"{signal.SIGTERM.value} None"
    process.communicate(timeout=50)
    assert process.returncode == 0


def test_asking_costs_next_to_nothing(tmp_path):
    stop = StopRequest(StopConfig(), tmp_path, is_main=True)
    start = time.monotonic()
    for _ in range(10_000):
        stop.reason()
    assert (time.monotonic() - start) / 10_000 < 50e-6
