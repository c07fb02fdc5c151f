"""States of the runs of a sweep, from the files in their folders. No torch.

A run is `finished`, `running`, `stopped` (on request), `interrupted` (its process is gone), `failed`, `diverged` (it
ended itself because of its loss), or `missing` (it never began).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.errors import TrainingError
from megadiff.metric_lines import number, parsed
from megadiff.run.sweep_folder import read_manifest
from megadiff.supervision.launch import Holder
from megadiff.supervision.status import FINISHED, RUNNING, STOPPED, read_status
from megadiff.untrusted_files import UnreadableFileError, open_plain

STATES = ("finished", "running", "stopped", "interrupted", "failed", "diverged", "missing")
_TAIL_BYTES = 2**16


@dataclass(frozen=True)
class RunState:
    """One run of a sweep."""

    name: str
    noise: str
    state: str
    """State, one of `STATES`."""
    step: int
    steps: int
    loss: float | None
    """Newest validation ELBO in nats per token; of a run without one, the newest training ELBO."""
    reason: str
    """Reason why the run failed or stopped."""
    trunk: str | None = None
    """Name of the run that this one branches from."""


def states(folder: Path) -> list[RunState]:
    """Return the states of all runs of a sweep's folder, in the order of its manifest.

    Raises:
        ConfigError: it is no folder of a sweep.
    """
    return [state_of(folder, entry) for entry in read_manifest(folder)["runs"]]


def state_of(folder: Path, entry: dict[str, Any]) -> RunState:
    """Return the state of the run that an entry of the manifest describes."""
    run = folder / "runs" / entry["name"]
    name, steps, noise, trunk = entry["name"], entry["steps"], str(entry.get("noise", "")), entry.get("trunk")
    status, holder = read_status(run), Holder.read(run)
    is_alive = holder is not None and holder.is_here and not holder.is_leaving
    if status is None:
        begun = "interrupted" if (run / "config.yaml").exists() else "missing"
        return RunState(name, noise, "running" if is_alive else begun, 0, steps, None, "", trunk)
    state = status.state
    if state == FINISHED:
        state = "finished" if status.step >= steps else "stopped"
    elif is_alive:
        state = "running"
    elif state == RUNNING:
        state = "interrupted" if holder is None or holder.is_leaving else "running"  # perhaps on another machine
    elif state != STOPPED:
        state = "diverged" if status.exit_code == TrainingError.exit_code else "failed"
    step, loss = _newest(run)
    step = max(step, status.step) if state == "running" else status.step
    return RunState(name, noise, state, step, steps, loss, status.reason, trunk)


def _newest(run: Path) -> tuple[int, float | None]:
    """Return the last step in the metrics, and the newest loss, from the end of the file alone."""
    try:
        with open_plain(run / "metrics.jsonl") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read(_TAIL_BYTES)
    except (OSError, UnreadableFileError):
        return 0, None
    lines = [line for raw in tail.splitlines() if (line := parsed(raw)) is not None]
    step = max((line["step"] for line in lines), default=0)
    for key in ("eval_elbo", "elbo"):
        found = [value for line in lines if (value := number(line, key)) is not None]
        if found:
            return step, found[-1]
    return step, None


def counts(found: Iterable[RunState]) -> str:
    """Return the number of runs in each state, such as `3 finished, 1 missing`."""
    number_of = Counter(each.state for each in found)
    return ", ".join(f"{number_of[state]} {state}" for state in STATES if number_of[state])
