from __future__ import annotations

import json
import os
import stat
import threading

from megadiff.supervision.status import Status, read_status, record_failure, write_status


def running(**changes):
    return Status.now("running", step=3, steps=10, **changes)


def test_a_status_names_job_attempt_and_host(tmp_path):
    environ = {"SLURM_JOB_ID": "412", "SLURM_RESTART_COUNT": "2"}
    write_status(tmp_path, Status.now("stopped", step=7, steps=10, reason="SIGTERM", exit_code=0, environ=environ))

    found = json.loads((tmp_path / "status.json").read_text())
    assert found["time"].endswith("+00:00")
    assert {key: found[key] for key in ("state", "step", "steps", "reason", "exit_code", "job", "attempt", "host")} == {
        "state": "stopped",
        "step": 7,
        "steps": 10,
        "reason": "SIGTERM",
        "exit_code": 0,
        "job": "412",
        "attempt": 2,
        "host": os.uname().nodename,
    }
    assert read_status(tmp_path) == Status(**found)
    assert sorted(os.listdir(tmp_path)) == [".status.reserve", "status.json"]
    assert stat.S_IMODE((tmp_path / "status.json").stat().st_mode) & 0o400


def test_no_status_and_no_status_of_ours_are_none(tmp_path):
    assert read_status(tmp_path) is None
    for text in ("", "{", "[]", "3", '{"state": "sleeping"}', '{"state": "running"}', "\udcff"):
        (tmp_path / "status.json").write_text(text, errors="surrogateescape")
        assert read_status(tmp_path) is None, text


def test_a_failure_is_recorded_only_over_the_same_launchs_running_status(tmp_path):
    assert not record_failure(tmp_path, "x", exit_code=6, launch="a")
    assert not (tmp_path / "status.json").exists()

    write_status(tmp_path, running(launch="a"))
    assert not record_failure(tmp_path, "of another launch", exit_code=6, launch="b")
    assert record_failure(tmp_path, "rank 1 stalled", exit_code=6, launch="a")
    assert not record_failure(tmp_path, "an effect", exit_code=1, launch="a")

    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.reason, status.exit_code, status.step) == ("failed", "rank 1 stalled", 6, 3)


def test_a_reader_never_sees_half_a_status(tmp_path):
    is_over = threading.Event()

    def write():
        while not is_over.is_set():
            write_status(tmp_path, running(reason="x" * 5000))

    write_status(tmp_path, running())
    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(read_status(tmp_path) is not None for _ in range(2000))
    finally:
        is_over.set()
        writer.join()
