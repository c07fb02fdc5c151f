"""Small sweeps: their descriptions on disk, and a local pool whose workers are forked, so that none imports torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import stat
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.commands import write_yaml
from tests.support.runs import toy_tree

MEASURED = re.compile(r"_per_s$|_s$|tflops|peak_bytes|goodput|^mfu$|^hfu$|^attempts$|suggested_save_steps")
"""Keys of a line of metrics that depend on the clock or the process."""


def write_description(folder: Path, corpus: Path, base: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A sweep of three sizes over toy data, whose runs take 8 to 29 steps; `base` changes the base run."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model__layers": 1,
        "schedule": {"steps": 10, "warmup_steps": 2},
        "checkpoint": {"every": 4},
        "data__vocab_size": 260,
        **(base or {}),
    }
    write_yaml(folder / "base.yaml", toy_tree(corpus, folder / "unused", **settings))
    tree = {
        "name": "small",
        "output_dir": str(folder),
        "run": "base.yaml",
        "noises": ["masked"],
        "sizes": {"shapes": ["1x16x2", "2x16x2", "1x32x2"]},
        "budgets": {"flops": [4e7, 8e7]},
        "grid": [{"sequences": [8], "learning_rates": [0.002]}],
        **changes,
    }
    return write_yaml(folder / "sweep.yaml", {key: value for key, value in tree.items() if value is not None})


class ForkedProcess:
    """A forked worker, as the pool sees it."""

    def __init__(self, pid: int) -> None:
        self.pid, self._code = pid, None

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def send_signal(self, sig: int) -> None:
        if self._code is None:
            os.kill(self.pid, sig)


def fork_worker(number: int, commands: int, replies: int, lock: int) -> ForkedProcess:
    """Start a worker of a pool by a fork; it holds no other descriptor of the pool."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
        return ForkedProcess(pid)
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT}
        )  # the pool's own handler is not for it
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in (commands, replies, lock):
                with contextlib.suppress(OSError):
                    if stat.S_ISFIFO(os.fstat(int(name)).st_mode):  # others may be those of gloo's own threads
                        os.close(int(name))
        from megadiff.run.sweep_pool import serve

        serve(os.fdopen(commands, "rb"), os.fdopen(replies, "wb"))
    finally:
        os._exit(0)


def start_pool(folder: Path, jobs: int = 1, start: Any = fork_worker) -> Any:
    """A pool over a written sweep in a forked process of its own; what it shows goes to `said` in the folder."""
    process = multiprocessing.get_context("fork").Process(target=_pool_main, args=(folder, jobs, start))
    process.start()
    return process


def run_pool(folder: Path, jobs: int = 1, *, timeout_s: float = 200.0) -> str:
    """Train a written sweep to the end; what the pool has shown."""
    process = start_pool(folder, jobs)
    process.join(timeout_s)
    alive = process.is_alive()
    process.kill()
    assert not alive, said(folder)
    return said(folder)


def said(folder: Path) -> str:
    """Return the lines that all pools have shown."""
    return (folder / "said").read_text()


def _pool_main(folder: Path, jobs: int, start: Any) -> None:
    from megadiff.errors import MegadiffError
    from megadiff.run.sweep_pool import Pool

    handle = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  pytest has put its own in place
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    pool = Pool(folder, jobs, partial(print, flush=True), start)
    try:
        pool.train()
    except MegadiffError as error:
        print(f"error: {error}", flush=True)
        os._exit(error.exit_code)
    os._exit(1 if pool.failures else 130 if pool.signals else 0)


def content_of(run: Path) -> dict[str, Any]:
    """All of a run folder that must not depend on what happened to the run: figures, settings, and its last weights."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{key: value for key, value in line.items() if not MEASURED.search(key)} for line in lines]
    last = max((run / "checkpoints").glob("step_*"))  # LATEST is a hint, which a kill may leave behind
    weights = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.glob("*.distcp")}
    assert weights
    return {"figures": figures, "weights": weights, "config": (run / "config.yaml").read_text()}
