"""What follows an attempt: done, given up, or again. The scheduler's answers are those a real one gave."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm/restart.py"
_spec = importlib.util.spec_from_file_location("restart", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
restart = importlib.util.module_from_spec(_spec)
sys.modules["restart"] = restart
_spec.loader.exec_module(restart)

LIMIT = 1_000_000.0
RUNNING = restart.Scheduled("RUNNING", 0, LIMIT)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "slurm").mkdir()
    return tmp_path


def attempt_of(run, number=0, max_restarts=5):
    return restart.Attempt(run, "12", number, max_restarts)


def decide(run, state, number=0, job=RUNNING, **facts):
    """The code of `decide` when the trainer has said `state`; `max_restarts` 5."""
    status = {} if state is None else {"state": state, "reason": "", "exit_code": None, **facts}
    return restart.decide(attempt_of(run, number), status, job, LIMIT).code


def start(run, number, step=None):
    if step is not None:
        (run / "LATEST").write_text(f"step_{step:08d}\n")
    return restart.begin(attempt_of(run, number)).code


@pytest.mark.parametrize(
    ("state", "facts", "code"),
    [
        ("finished", {}, 0),
        ("no_restart", {"exit_code": 2}, 2),
        ("no_restart", {"exit_code": 5}, 5),
        ("no_restart", {"exit_code": None}, 1),
        ("no_restart", {"exit_code": 0}, 1),
        ("stopped", {"reason": "SIGUSR2"}, 75),
        ("stopped", {"reason": "SIGTERM"}, 75),
        ("stopped", {"reason": "time limit: 99 s left of SLURM_JOB_END_TIME"}, 75),
        ("stopped", {"reason": "stop file /runs/a/STOP"}, 0),
        ("failed", {}, 75),
        ("running", {}, 75),
        (None, {}, 75),
    ],
)
def test_the_trainers_word_decides_while_the_job_is_running(run, state, facts, code):
    start(run, 0)
    assert decide(run, state, **facts) == code


def test_a_scheduler_that_does_not_answer_does_not_stop_a_run(run):
    start(run, 0)
    assert decide(run, "stopped", job=None) == 75


@pytest.mark.parametrize("state", ["stopped", "running", "failed", None])
def test_a_cancelled_job_is_not_revived(run, state):
    """Its state reads COMPLETING, its restarts are this attempt's, and it ended when it was cancelled."""
    start(run, 0)
    assert decide(run, state, number=3, job=restart.Scheduled("COMPLETING", 3, LIMIT - 1)) == 0
    assert decide(run, state, number=3, job=restart.Scheduled("CANCELLED", 3, LIMIT - 1)) == 0


@pytest.mark.parametrize("state", ["stopped", "running", None])
def test_a_job_ended_by_its_time_limit_goes_on(run, state):
    start(run, 0)
    assert decide(run, state, number=3, job=restart.Scheduled("COMPLETING", 3, LIMIT)) == 75


def test_a_job_the_scheduler_put_back_is_left_alone(run):
    start(run, 0)
    assert decide(run, "stopped", number=3, job=restart.Scheduled("COMPLETING", 4, None)) == 0


def test_a_finished_run_is_finished_whatever_the_scheduler_does(run):
    assert decide(run, "finished", job=restart.Scheduled("COMPLETING", 0, LIMIT)) == 0


def test_a_stop_file_keeps_a_crashed_run_from_starting_again(run):
    start(run, 0)
    (run / "STOP").touch()
    assert decide(run, "failed") == 0


def test_the_third_restart_without_a_newer_checkpoint_is_the_last(run):
    codes = []
    for number in range(4):
        assert start(run, number, step=40) == 0
        codes.append(decide(run, "failed", number))
    assert codes == [75, 75, 75, 93]


def test_progress_renews_the_three_restarts(run):
    codes = []
    for number, step in enumerate([40, 40, 40, 60, 60, 60, 60]):
        start(run, number, step=step)
        codes.append(decide(run, "stopped", number))
    assert codes == [75] * 6 + [93]


def test_an_older_checkpoint_after_a_damaged_one_is_no_progress(run):
    for number, step in enumerate([60, 40, 60]):
        start(run, number, step=step)
    start(run, 3, step=40)
    assert decide(run, "stopped", 3, reason="SIGTERM") == 93


def test_a_checkpoint_of_this_attempt_counts_at_once(run):
    for number in range(4):
        start(run, number, step=40)
    (run / "LATEST").write_text("step_00000041\n")
    assert decide(run, "failed", 3) == 75


def test_restarts_that_others_asked_for_are_counted_at_the_start(run):
    assert [start(run, number) for number in range(5)] == [0, 0, 0, 0, 93]


def test_only_crashes_use_up_the_restarts(run):
    codes = []
    for number in range(20):
        start(run, number, step=number)
        codes.append(decide(run, "stopped" if number % 2 else "failed", number))
    assert codes[:11] == [75] * 10 + [93]


def test_the_word_of_another_job_or_attempt_does_not_count(run):
    for job, number, counts in (("12", 1, True), (12, 1, True), ("11", 1, False), ("12", 0, False), (None, 0, False)):
        (run / "status.json").write_text(json.dumps({"state": "finished", "job": job, "attempt": number}))
        assert bool(restart.read_status(attempt_of(run, 1), "12")) is counts


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '"finished"'])
def test_a_damaged_status_is_none(run, text):
    (run / "status.json").write_text(text)
    assert restart.read_status(attempt_of(run), "12") == {}


def test_a_line_cut_short_in_the_history_is_left_out(run):
    start(run, 0, step=40)
    with attempt_of(run).history.open("a") as file:
        file.write('{"attempt": 1, "st')
    assert [line["step"] for line in restart.read_history(attempt_of(run))] == [40]


def test_a_node_that_does_not_end_is_waited_for_ten_minutes(run):
    (run / "status.json").write_text("{}")
    for age, state, code in ((599, "failed", 0), (601, "failed", 75), (601, "stopped", 75), (10_000, "running", 0)):
        written = time.time() - age
        os.utime(run / "status.json", (written, written))
        assert restart.lingers(attempt_of(run), {"state": state}).code == code


def test_the_batch_hosts_python_needs_no_package(tmp_path):
    """`-I -S`: neither the repository nor any installed package can be imported."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "LATEST").write_text("step_00000007\n")
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "12", "MEGADIFF_JOB": "12"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", SCRIPT, "begin", tmp_path, "5"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("the newest checkpoint is step 7\n")
