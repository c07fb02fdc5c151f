"""The script of GPU measurements on a CPU: every part runs, has its own files, and is kept by a second start."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]
SCRIPT = REPOSITORY / "tools/benchmarks/gpu.sh"
PARTS = ["environment", "tests", "training", "fp8", "head"]


def _start(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    usual = {"PYTHON": sys.executable, "GPU_REHEARSAL": "1", "GPU_COMMIT": "one", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **usual, **variables}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "OUT"):
        env.pop(name, None)
    return subprocess.run([SCRIPT, folder], env=env, capture_output=True, text=True, check=False)


def _states(folder: Path) -> dict[str, str]:
    return {name: (folder / f"{name}.state").read_text().strip() for name in PARTS}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    ended = _start(folder, GPU_SECONDS="2000")
    assert ended.returncode == 0, ended.stdout
    return folder


def test_every_part_ends_well_in_files_of_its_own(rehearsed: Path) -> None:
    assert all(state.startswith("ok, ") for state in _states(rehearsed).values())
    lines = (rehearsed / "summary.txt").read_text().splitlines()
    assert lines[0] == "commit       one, a rehearsal"
    assert [line.split()[0] for line in lines[1:6]] == PARTS
    facts = json.loads((rehearsed / "environment.json").read_text())
    assert not [name for name, value in facts.items() if str(value).startswith("FAILED")]
    head = json.loads((rehearsed / "head.json").read_text())
    assert [row["what"] for row in head["rows"] if "failed" in row] == []
    assert {line["pass"] for line in head["passes"]} == {"sums", "shares", "gradient"}
    runs = json.loads((rehearsed / "training.json").read_text())["runs"]
    assert [run["precision"] for run in runs if "tokens_per_s" in run][:1] == ["bf16"]
    assert "elbo" in json.loads((rehearsed / "fp8_quality.json").read_text())["none"]
    passed = re.search(r"(\d+) passed", (rehearsed / "tests.log").read_text())
    assert passed is not None
    assert int(passed[1]) >= 30
    assert " failed" not in (rehearsed / "tests.log").read_text().splitlines()[-1]


def test_a_second_start_runs_what_did_not_end_well_alone(rehearsed: Path) -> None:
    (rehearsed / "environment.state").write_text("CUT OFF\n")
    logs = {name: (rehearsed / f"{name}.log").stat().st_mtime_ns for name in PARTS}
    ended = _start(rehearsed, GPU_SECONDS="2000")
    assert ended.returncode == 0, ended.stdout
    assert [line.split()[1] for line in ended.stdout.splitlines() if ": kept, " in line] == [
        f"{name}:" for name in PARTS[1:]
    ]
    again = {name: (rehearsed / f"{name}.log").stat().st_mtime_ns for name in PARTS}
    assert [name for name in PARTS if again[name] != logs[name]] == ["environment"]
    assert _states(rehearsed)["environment"].startswith("ok, ")


def test_another_commit_starts_anew_and_a_part_without_time_is_not_run(rehearsed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(rehearsed, tmp_path / "found")
    ended = _start(folder, GPU_COMMIT="two", GPU_SECONDS="5")
    assert set(_states(folder).values()) == {"not run, no time left"}
    assert ended.returncode == 0
    assert not list(folder.glob("*.json"))


def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    ended = _start(tmp_path, PYTHON="false")
    assert ended.returncode == 1
    assert all(state.startswith("FAILED (1)") for state in _states(tmp_path).values())


def test_the_parts_have_their_own_limits_which_end_below_ten_minutes() -> None:
    text = SCRIPT.read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r"^part (\w+) (\d+) ", text, re.MULTILINE)}
    assert list(limits) == PARTS
    (kill_after,) = re.findall(r"--kill-after=(\d+)", text)
    (whole,) = re.findall(r"GPU_SECONDS:-(\d+)", text)
    assert sum(limits.values()) <= int(whole)
    assert int(whole) + len(limits) * int(kill_after) < 600
