"""SIGKILL of the launcher, in setup, in a step, in an evaluation and amid a save: every rank ends, the run resumes.

The suite kills a launcher that forks its ranks once at each of these moments, and a real torchrun once, while its
ranks import. For more: `MEGADIFF_LAUNCHER_KILLS=10 MEGADIFF_LAUNCHER_RANKS=2,8 MEGADIFF_LAUNCHER=torchrun`, or
`MEGADIFF_LAUNCHER=forked`, and `python -m pytest tests/end_to_end/test_launcher_death.py -s`.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megadiff.checkpoint.folder import newest_complete, verify_files
from megadiff.run.config import RunConfig
from tests.support.commands import REPOSITORY, write_yaml
from tests.support.runs import toy_tree
from tests.support.whole_runs import Ranks, last_step, run_to_end, status

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(36000)]

KILLS = int(os.environ.get("MEGADIFF_LAUNCHER_KILLS", "1"))
RANKS = [int(ranks) for ranks in os.environ.get("MEGADIFF_LAUNCHER_RANKS", "2").split(",")]
LAUNCHER = os.environ.get("MEGADIFF_LAUNCHER", "forked")
GONE_S, STEPS, EVALUATE_EVERY = 5.0, 12, 4
LAYOUTS = {2: {"parallel__tensor": 2}, 8: {"parallel__tensor": 2, "batch__micro_batch_size": 1}}


def _tree(corpus: Path, output: Path, name: str, ranks: int) -> dict[str, Any]:
    return toy_tree(
        corpus,
        output,
        name=name,
        model__layers=1,
        schedule={"steps": STEPS, "warmup_steps": 2},
        checkpoint={"every": 3},
        eval={"every": EVALUATE_EVERY, "sequences": 32, "num_noise_levels": 2},
        **LAYOUTS[ranks],
    )


class Launched:
    """A launcher and its ranks."""

    def __init__(self, config: RunConfig, ranks: int, launcher: str) -> None:
        self.config, self.ranks = config, ranks
        self._pids = config.folder.parent / f"{config.name}.pids"
        self._pids.unlink(missing_ok=True)
        if launcher == "forked":
            process = multiprocessing.get_context("fork").Process(target=self._launch)
            process.start()
            self._wait_for_end: Callable[[], object] = process.join
            self.pid = process.pid or 0
        else:
            path = write_yaml(
                config.folder.parent / f"{config.name}.yaml", config.model_dump(mode="json", by_alias=True)
            )
            torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
            log = open(config.folder.parent / f"{config.name}.torchrun", "a")  # noqa: SIM115
            command = [sys.executable, *torchrun, "pretrain_dlm.py", "--config", str(path)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
            agent = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=log, stderr=log)
            self._wait_for_end, self.pid = agent.wait, agent.pid

    def _launch(self) -> None:
        """As torchrun does: start the ranks, and watch."""
        launched = Ranks(self.config, self.ranks)
        self._pids.write_text(" ".join(str(process.pid) for process in launched._processes))
        launched.end(within_s=300)
        os._exit(0)

    def processes(self, *, within_s: float = 120.0) -> list[psutil.Process]:
        """The ranks, as soon as all are started."""
        end = time.monotonic() + within_s
        while True:
            assert time.monotonic() < end, "the ranks were not started"
            children = psutil.Process(self.pid).children(recursive=True)
            found = [child for child in children if self._is_rank(child)]
            if len(found) == self.ranks:
                return found
            time.sleep(0.002)

    def _is_rank(self, process: psutil.Process) -> bool:
        try:
            if self._pids.exists():
                return str(process.pid) in self._pids.read_text().split()
            return "pretrain_dlm.py" in process.cmdline()
        except psutil.Error:
            return False

    def kill(self) -> None:
        """SIGKILL of the launcher alone."""
        os.kill(self.pid, signal.SIGKILL)
        self._wait_for_end()


def _wait(launched: Launched, ranks: list[psutil.Process], is_there: Callable[[], bool]) -> None:
    end = time.monotonic() + 200.0
    while not is_there():
        assert time.monotonic() < end, "the moment did not come"
        assert all(rank.is_running() for rank in ranks), "a rank has ended"
        time.sleep(0.001)


def _reach(moment: str, launched: Launched, ranks: list[psutil.Process], draw: random.Random) -> None:
    """Wait for the moment, and a little more."""
    folder = launched.config.folder
    if moment == "setup":
        time.sleep(draw.uniform(0.0, 0.4 if LAUNCHER == "forked" else 8.0))
    elif moment == "step":
        step = draw.randrange(1, STEPS - 2)
        _wait(launched, ranks, lambda: last_step(folder) >= step)
    elif moment == "evaluation":
        # The line of a step is written before the evaluation that follows it, and the file before the first one.
        step = draw.randrange(0, 3) * EVALUATE_EVERY
        _wait(launched, ranks, lambda: (folder / "metrics.jsonl").exists() and last_step(folder) >= step)
    else:
        saved = draw.randrange(0, 3)
        _wait(launched, ranks, lambda: _saves(folder) == saved and any(folder.glob("checkpoints/.step_*.tmp/*")))


def _saves(folder: Path) -> int:
    return sum(path.name.startswith("step_") for path in folder.glob("checkpoints/step_*"))


def _seconds_until_gone(ranks: list[psutil.Process]) -> float:
    began, left = time.monotonic(), ranks
    while left and time.monotonic() < began + 4 * GONE_S:
        left = [rank for rank in left if _is_there(rank)]
        time.sleep(0.01)
    for rank in left:
        rank.kill()
    return time.monotonic() - began


def _is_there(rank: psutil.Process) -> bool:
    try:
        return rank.status() != "zombie"
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module", params=RANKS)
def wanted(request, toy_corpus, tmp_path_factory):
    """The curve of a run whose launcher lives."""
    folder = tmp_path_factory.mktemp("launcher")
    return request.param, run_to_end(
        RunConfig.model_validate(_tree(toy_corpus, folder, "whole", request.param)), request.param
    )


@pytest.mark.parametrize("moments", [("setup", "step"), ("evaluation",), ("save",)], ids=" and ".join)
def test_no_rank_outlives_its_launcher_and_the_same_run_goes_on(wanted, toy_corpus, tmp_path, moments):
    """A run loses its launcher at each of the moments; then it trains to its end."""
    ranks, curve = wanted
    draw = random.Random(f"{moments}-{ranks}-{os.environ.get('MEGADIFF_SEED', '0')}")
    took, where = [], []
    for number in range(KILLS):
        config = RunConfig.model_validate(_tree(toy_corpus, tmp_path, f"{moments[0]}-{number}", ranks))
        for moment in moments:
            launched = Launched(config, ranks, LAUNCHER)
            processes = launched.processes()
            _reach(moment, launched, processes, draw)
            where.append(last_step(config.folder))
            launched.kill()
            took.append(_seconds_until_gone(processes))
            assert took[-1] < GONE_S, f"kill {number} in {moment}: a rank lived on for {took[-1]:.1f} s"
            if moment == "step" and LAUNCHER == "forked":
                _check_reported_cause(launched)
            newest = newest_complete(config.folder)
            if newest is not None:
                verify_files(newest, hashes=True)
        assert run_to_end(config, ranks) == curve, f"kills {number} in {moments} after steps {where[-len(moments) :]}"
        assert status(config.folder)["state"] == "finished"
    print(
        f"\n{len(took)} kills of a {LAUNCHER} launcher of {ranks} ranks in {' and '.join(moments)}: after steps "
        f"{where}; all ranks gone within {max(took):.2f} s; {KILLS} of {KILLS} runs resumed bit for bit"
    )


def _check_reported_cause(launched: Launched) -> None:
    """Assert that the status and the log name the launcher that is gone."""
    folder = launched.config.folder
    end = time.monotonic() + 5.0
    while status(folder)["state"] == "running" and time.monotonic() < end:
        time.sleep(0.05)
    found = status(folder)
    assert (found["state"], found["exit_code"]) == ("failed", 1)
    cause = f"first cause: the launcher of these ranks (pid {launched.pid}) is gone, so they were ended"
    assert found["reason"].startswith(cause)
    assert (folder / "log.txt").read_text().count(cause) == 1


def test_ranks_of_a_real_torchrun_end_with_it_while_they_still_import(toy_corpus, tmp_path):
    config = RunConfig.model_validate(_tree(toy_corpus, tmp_path, "imports", 2))
    launched = Launched(config, 2, "torchrun")
    ranks = launched.processes()
    time.sleep(0.3)
    launched.kill()
    assert _seconds_until_gone(ranks) < GONE_S
    assert not (config.folder / "metrics.jsonl").exists()
