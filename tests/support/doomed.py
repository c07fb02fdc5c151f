"""Forked ranks that are meant to hang or die: under watchdogs, with what they said and how long it took.

Unlike `ranks.on_ranks` nothing is expected to return. The parent must not have opened a process group.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megadiff.supervision.config import WatchdogConfig
from megadiff.supervision.launch import Launch
from megadiff.supervision.watchdog import Watchdog

STEPS = 4
HARM_STEP = 3
Harm = Callable[[Watchdog], object]
"""Done by one rank between `data` and `reduce` of step 3."""


@dataclass(frozen=True)
class Ended:
    """What became of the ranks."""

    exit_codes: list[int | None]
    """Negative: the signal. None: still there at the deadline (then killed)."""
    seconds: float
    """From the harm (or the start, if there was none) to the end of the last rank."""
    pids: list[int]
    stderr: str
    log: str
    launch: Launch
    node_folder: Path

    @property
    def causes(self) -> list[str]:
        """First-cause lines on stderr."""
        return [line for line in self.stderr.splitlines() if line.startswith("first cause: ")]


def run_doomed(
    folder: Path,
    world_size: int,
    harm: Harm | None = None,
    *,
    harmed: int = 0,
    gloo: bool = False,
    limit_s: float = 1.0,
    deadline_s: float = 20.0,
    local_world_size: int | None = None,
) -> Ended:
    """Run ranks of four steps, `harmed` doing `harm` in the third.

    Args:
        gloo: meet in real collectives, which notice a peer's death; else the others wait in a sleep, as a collective of
            a GPU would for ten minutes.
        limit_s: of every section of the watchdog but `setup`.
    """
    run_folder = folder / "run"
    run_folder.mkdir()
    environ = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}
    launches = [
        Launch.from_env(
            run_folder, rank=rank, world_size=world_size, local_world_size=local_world_size, environ=environ
        )
        for rank in range(world_size)
    ]
    start = time.monotonic()
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank_main, args=(launch, folder, harm, launch.rank == harmed, gloo, limit_s))
        for launch in launches
    ]
    for process in ranks:
        process.start()
    _wait(ranks, start + deadline_s)
    end = time.monotonic()
    _wait_for_watchers(run_folder)
    for process in ranks:
        process.join(0.5)  # a zombie whose threads are still ending cannot be waited for at once
    exit_codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    with contextlib.suppress(FileNotFoundError):
        start = float((folder / "harm").read_text())
    log = run_folder / "log.txt"
    return Ended(
        exit_codes,
        end - start,
        [process.pid or 0 for process in ranks],
        (folder / "stderr").read_text(),
        log.read_text() if log.exists() else "",
        launches[0],
        Path((folder / "node_folder").read_text()),
    )


def traces(ended: Ended, *, within_s: float = 2.0) -> list[str]:
    """What is left on this node of a launch: watchers, ranks' children, files in memory; given time to go."""
    until = time.monotonic() + within_s
    while found := [*_processes_of(ended.launch.run_folder), *ended.node_folder.parent.glob(ended.node_folder.name)]:
        if time.monotonic() > until:
            return [str(trace) for trace in found]
        time.sleep(0.05)
    return []


def _processes_of(run_folder: Path) -> list[str]:
    """Command lines that name the run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any(str(run_folder) in word for word in words) and process.status() != "zombie":
                found.append(" ".join(words))
    return found


def _wait_for_watchers(run_folder: Path) -> None:
    """They speak within half a second of their rank's end; longer only for want of processors."""
    until = time.monotonic() + 60.0
    while _processes_of(run_folder) and time.monotonic() < until:
        time.sleep(0.02)


def _wait(ranks: list[Any], deadline: float) -> None:
    """Without reaping: a rank's end is told by the state of its process, as a launcher that polls would find it."""
    left = [psutil.Process(process.pid) for process in ranks]
    while left and time.monotonic() < deadline:
        left = [process for process in left if _is_there(process)]
        time.sleep(0.02)


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.status() != "zombie"
    except psutil.NoSuchProcess:
        return False


def _rank_main(launch: Launch, folder: Path, harm: Harm | None, is_harmed: bool, gloo: bool, limit_s: float) -> None:
    handle = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 2)
    logging.getLogger("megadiff").addHandler(logging.StreamHandler(open(2, "w", closefd=False)))  # noqa: SIM115
    config = WatchdogConfig(setup_s=30, step_s=limit_s, eval_s=limit_s, save_s=limit_s)
    with Watchdog(config, launch) as watchdog:
        (folder / "node_folder").write_text(str(launch.node_folder()))
        with watchdog.section("setup"):
            meet = _open_gloo(launch, folder) if gloo else (lambda: _wait_for(folder, launch))
        for step in range(1, STEPS + 1):
            with watchdog.section("step", step=step):
                watchdog.mark("data")
                if step == HARM_STEP and is_harmed and harm is not None:
                    (folder / "harm").write_text(str(time.monotonic()))
                    harm(watchdog)
                watchdog.mark("reduce")
                meet()


def _wait_for(folder: Path, launch: Launch) -> None:
    """A barrier on disk that, once a rank has come to harm, is never passed and notices nothing."""
    seen = len(list(folder.glob(f"at-{launch.rank}-*")))
    (folder / f"at-{launch.rank}-{seen}").touch()
    while any(not (folder / f"at-{rank}-{seen}").exists() for rank in range(launch.world_size)):
        time.sleep(0.01)


def _open_gloo(launch: Launch, folder: Path) -> Callable[[], object]:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=launch.rank, world_size=launch.world_size
    )
    tensor = torch.zeros(1000)
    return lambda: torch.distributed.all_reduce(tensor)
