"""The real commands as subprocesses: start, watch what a run writes, end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from megadiff.metric_lines import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]


def start(*command: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start `python COMMAND...` in the repository, its output piped."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float = 900.0) -> tuple[int, str, str]:
    """Wait for the end: exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, out, err


def call(*command: str | Path) -> tuple[int, str, str]:
    """Start and finish."""
    return finish(start(*command))


def write_yaml(path: Path, tree: dict[str, Any]) -> Path:
    """A run description on disk."""
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str], *, timeout_s: float = 900.0) -> None:
    """Until `metrics.jsonl` has a line of this step or a later one."""
    end = time.monotonic() + timeout_s
    while not any(line["step"] >= step for line in read_metrics(folder / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"no step {step} in {timeout_s} s"
        time.sleep(0.005)
