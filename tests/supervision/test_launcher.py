"""A rank ends when its launcher does, whatever it is doing; a process without a launcher outlives its shell."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megadiff.supervision.launch import Launcher
from tests.support.commands import REPOSITORY

GONE_S = 5.0
ELASTIC = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
BY_HAND = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}
ALONE: dict[str, str] = {}

SLEEPS = "time.sleep(60)"
HOLDS_THE_LOCK = "import ctypes; ctypes.PyDLL(None).sleep(60)"
STOPS_ITSELF = "os.kill(os.getpid(), signal.SIGSTOP)"

RANK = """
import os, signal, sys, time
time.sleep(float(sys.argv[2]))
from megadiff.supervision.launch import end_with_launcher
end_with_launcher()
with open(sys.argv[1] + ".making", "w") as file:
    file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".making", sys.argv[1])
"""

LAUNCHER = """
import json, os, subprocess, sys, time
subprocess.Popen(json.loads(sys.argv[1]), env={**os.environ, **json.loads(sys.argv[2])}, start_new_session=True)
time.sleep(float(sys.argv[3]))
"""


def _environ() -> dict[str, str]:
    left_out = ("TORCHELASTIC", "SLURM_", "LOCAL_", "RANK", "WORLD_SIZE")
    environ = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
    return {**environ, "PYTHONPATH": str(REPOSITORY)}


def _launch(
    folder: Path, rank_environ: dict[str, str], *, does: str = SLEEPS, wrapper: bool = False, starts_after: float = 0.0
) -> subprocess.Popen[bytes]:
    """A launcher with one rank, which may have a shell between them."""
    rank = [sys.executable, "-c", RANK + does, str(folder / "pid"), str(starts_after)]
    if wrapper:
        rank = ["/bin/sh", "-c", '"$@"; echo the rank has ended', "wrapper", *rank]
    lives = "60" if not starts_after else "0"
    command = [sys.executable, "-c", LAUNCHER, json.dumps(rank), json.dumps(rank_environ), lives]
    return subprocess.Popen(command, env=_environ(), stderr=open(folder / "stderr", "wb"))


def _rank(folder: Path, *, within_s: float = 20.0) -> psutil.Process:
    end = time.monotonic() + within_s
    while not (folder / "pid").exists():
        assert time.monotonic() < end, (folder / "stderr").read_text()
        time.sleep(0.01)
    return psutil.Process(int((folder / "pid").read_text()))


def _is_gone(process: psutil.Process, *, within_s: float = GONE_S) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if process.status() == "zombie":
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("does", [SLEEPS, HOLDS_THE_LOCK, STOPS_ITSELF], ids=["sleeps", "holds the lock", "stopped"])
@pytest.mark.parametrize("environ", [ELASTIC, BY_HAND, SLURM], ids=["torchrun", "by hand", "slurm"])
def test_a_rank_ends_with_its_launcher(tmp_path, environ, does):
    launcher = _launch(tmp_path, environ, does=does)
    rank = _rank(tmp_path)
    time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    try:
        assert _is_gone(rank)
    finally:
        if rank.is_running():
            rank.kill()


def test_a_rank_behind_a_wrapper_script_ends_with_the_launcher(tmp_path):
    """The shell, the rank's parent, lives on; the launcher is who counts."""
    launcher = _launch(tmp_path, ELASTIC, wrapper=True)
    rank = _rank(tmp_path)
    launcher.kill()
    launcher.wait()
    assert _is_gone(rank)
    said = (tmp_path / "stderr").read_text()
    assert said.startswith(f"error: the launcher of these ranks (pid {launcher.pid}) is gone, so they were ended; ")


@pytest.mark.parametrize("wrapper", [False, True])
def test_a_launcher_that_dies_during_start_is_missed_at_the_first_look(tmp_path, wrapper):
    launcher = _launch(tmp_path, ELASTIC, wrapper=wrapper, starts_after=1.0)
    launcher.wait()
    time.sleep(2.0)
    assert not (tmp_path / "pid").exists(), "it went on as an orphan"
    assert "is gone, so they were ended" in (tmp_path / "stderr").read_text()


def test_a_process_without_a_launcher_outlives_its_shell(tmp_path):
    shell = _launch(tmp_path, ALONE)
    process = _rank(tmp_path)
    shell.kill()
    shell.wait()
    assert not _is_gone(process, within_s=2.0)
    process.kill()


def test_one_process_by_hand_has_no_launcher(tmp_path):
    """`LOCAL_WORLD_SIZE=1 nohup python pretrain_dlm.py &`."""
    shell = _launch(tmp_path, {**BY_HAND, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"})
    process = _rank(tmp_path)
    shell.kill()
    shell.wait()
    assert not _is_gone(process, within_s=2.0)
    process.kill()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="a process namespace needs root")
@pytest.mark.parametrize("environ", [ELASTIC, BY_HAND], ids=["torchrun", "by hand"])
def test_in_a_container_the_first_process_may_be_the_launcher(tmp_path, environ):
    """The rank's parent has number 1 from the start, as an orphan's has."""
    rank = [sys.executable, "-c", RANK + "time.sleep(2)\nopen(sys.argv[1] + '.end', 'w')", str(tmp_path / "pid"), "0"]
    code = LAUNCHER.replace("time.sleep(float(sys.argv[3]))", "os.wait()")
    command = [sys.executable, "-c", code, json.dumps(rank), json.dumps(environ)]
    ended = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", *command], env=_environ(), check=False, timeout=60
    )
    if ended.returncode == 1 and not (tmp_path / "pid").exists():
        pytest.skip("this machine gives no process namespaces")
    assert (tmp_path / "pid.end").exists()


def test_the_launcher_is_an_ancestor_that_is_no_rank_itself():
    assert Launcher.find({}) is None
    assert Launcher.find({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None, "a batch script is no step"
    found = Launcher.find(ELASTIC)
    assert found is not None
    assert found.pid == os.getppid()
    assert found.is_alive
    assert not Launcher(found.pid, found.ticks + 1).is_alive, "another process of the same number"


def test_nothing_but_a_python_program_is_taken_for_torchruns_agent():
    from megadiff.supervision.launch import _may_be_an_agent

    assert _may_be_an_agent(os.getpid())
    other = subprocess.Popen(["/bin/sleep", "10"])
    try:
        assert not _may_be_an_agent(other.pid)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
