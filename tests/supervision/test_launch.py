"""Launches that are the same, holders of a run folder, and ranks that end when their launcher does, in any state.

A process without a launcher outlives its shell; a holder is named truly, also by a file that a killed process left.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from megadiff.errors import ConfigError, PlatformError
from megadiff.run.config import RunConfig
from megadiff.run.folder import run_folder
from megadiff.supervision import process
from megadiff.supervision.launch import Holder, Launch, Launcher
from tests.support.commands import REPOSITORY
from tests.support.runs import toy_config

TORCHRUN = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_WORLD_SIZE": "4"}


def launch(folder, rank=0, **environ):
    return Launch.from_env(folder, rank=rank, world_size=8, environ={**TORCHRUN, **environ})


def test_ranks_of_a_launch_agree_and_other_launches_differ(tmp_path):
    one = launch(tmp_path)
    assert launch(tmp_path, rank=5).key == one.key
    assert one.local_world_size == 4
    others = [
        launch(tmp_path / "other"),
        launch(tmp_path, MASTER_PORT="29501"),
        launch(tmp_path, TORCHELASTIC_RESTART_COUNT="1"),
        launch(tmp_path, SLURM_RESTART_COUNT="1"),
        launch(tmp_path, SLURM_JOB_ID="9"),
    ]
    assert len({one.key, *(other.key for other in others)}) == 6


def test_a_hostile_job_id_stays_out_of_paths(tmp_path):
    records = launch(tmp_path, SLURM_JOB_ID="../../etc/$(id)", SLURM_RESTART_COUNT="../1").records
    assert records.parent == tmp_path / "first_cause"
    assert records.name.startswith("local-0-")


def test_the_nodes_folder_is_private(tmp_path):
    folder = launch(tmp_path).node_folder()
    try:
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)
        with pytest.raises(PlatformError, match=r"others cannot enter, and is not; remove it"):
            launch(tmp_path).node_folder()
    finally:
        folder.rmdir()


def test_a_link_in_the_folders_place_is_refused(tmp_path):
    folder = launch(tmp_path).node_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    try:
        with pytest.raises(PlatformError, match="should be a folder of this user"):
            launch(tmp_path).node_folder()
    finally:
        folder.unlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_somebody_else_is_refused(tmp_path):
    folder = launch(tmp_path).node_folder()
    os.chown(folder, 65534, 65534)
    try:
        with pytest.raises(PlatformError, match="should be a folder of this user"):
            launch(tmp_path).node_folder()
    finally:
        folder.rmdir()


def test_the_watcher_needs_the_standard_library_alone():
    root = Path(__file__).resolve().parents[2]
    code = (
        f"import sys; sys.path.append({str(root)!r}); import megadiff.supervision.watcher;"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['__main__', 'megadiff']"


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
    end = time.monotonic() + 20.0  # a busy machine may take its time to start the rank
    while "is gone, so they were ended" not in (tmp_path / "stderr").read_text():
        assert not (tmp_path / "pid").exists(), "it went on as an orphan"
        assert time.monotonic() < end, "it was not ended"
        time.sleep(0.02)


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
