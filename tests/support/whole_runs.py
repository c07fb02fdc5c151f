"""`pretrain_dlm.py` on several ranks that are forked instead of started, so that none imports torch again.

Everything but the reading of the command line is the real program: run folder, watchdog, signals, process group, exit
codes. Ranks may be signalled, stopped and killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadiff.run.config import RunConfig
from megadiff.supervision.launch import Launch, heartbeat_path
from tests.support.runs import read_metrics

COMPARED = ("step", "tokens", "loss", "elbo", "kl", "itakura_saito", "weight", "grad_norm", "lr")


class Ranks:
    """The ranks of one launch; what they print goes to `NAME-RANK.out` beside the run folder."""

    def __init__(self, config: RunConfig, world_size: int, environ: Mapping[str, str] | None = None) -> None:
        self.config = config
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._launch = Launch.from_env(
            config.folder,
            rank=0,
            world_size=world_size,
            environ={**os.environ, **(environ or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        context = multiprocessing.get_context("fork")
        self._processes = [
            context.Process(target=_rank_main, args=(config, rank, world_size, port, dict(environ or {})))
            for rank in range(world_size)
        ]
        for process in self._processes:
            process.start()

    def send(self, rank: int, number: int) -> None:
        """Signal one rank."""
        pid = self._processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def end(self, *, within_s: float) -> list[int | None]:
        """Wait; exit codes, negative for a signal, None for a rank that had to be killed now."""
        end = time.monotonic() + within_s
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self._processes]
        for process in self._processes:
            process.kill()
            process.join()
        return codes

    def wait_until_watched(self, *, within_s: float = 60.0) -> None:
        """Until every rank has its watcher: one that dies earlier is its launcher's to notice, and here is none."""
        end = time.monotonic() + within_s
        folder = self._launch.node_folder()
        while not all(heartbeat_path(folder, rank).exists() for rank in range(len(self._processes))):
            assert time.monotonic() < end, f"not every rank was watched within {within_s} s: {self.said(0)}"
            time.sleep(0.005)

    def wait_for_step(self, step: int, *, within_s: float = 120.0) -> None:
        """Until the run has logged that many steps."""
        end = time.monotonic() + within_s
        while last_step(self.config.folder) < step:
            assert all(process.is_alive() for process in self._processes), self.said(0)
            assert time.monotonic() < end, f"no step {step} in {within_s} s: {self.said(0)}"
            time.sleep(0.005)

    def said(self, rank: int) -> str:
        """What a rank has printed in all launches of the run."""
        return _output(self.config, rank).read_text(errors="replace")


def run_to_end(config: RunConfig, world_size: int) -> list[list[Any]]:
    """Train until the last step; the curve."""
    ranks = Ranks(config, world_size)
    codes = ranks.end(within_s=300)
    assert codes == [0] * world_size, ranks.said(0) + ranks.said(world_size - 1)
    return curve(config.folder)


def curve(folder: Path) -> list[list[Any]]:
    """Every figure of a run that must not depend on what happened to it."""
    return [[line[key] for key in COMPARED] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def last_step(folder: Path) -> int:
    """The last step logged."""
    return max((line["step"] for line in read_metrics(folder / "metrics.jsonl")), default=0)


def status(folder: Path) -> dict[str, Any]:
    """`status.json`."""
    return json.loads((folder / "status.json").read_text())


def _output(config: RunConfig, rank: int) -> Path:
    return config.folder.parent / f"{config.name}-{rank}.out"


def _rank_main(config: RunConfig, rank: int, world_size: int, port: int, environ: dict[str, str]) -> None:
    log = os.open(_output(config, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  pytest has put its own in place
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(
        environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from megadiff.errors import run_command
    from megadiff.run import build

    run_command(lambda: build.run(config))
