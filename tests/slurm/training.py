"""A run under the scheduler, from outside: submitted, watched through the files it writes, interrupted, resumed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from megadiff.metric_lines import read_metrics
from tests.slurm.local_cluster import LocalCluster, wait_for
from tests.support.commands import REPOSITORY

HOSTILE = 'it\'s a "$(touch CANARY)" `touch CANARY` ${HOME} %j;touch CANARY& -x é'
"""A name of quotes, substitutions and a pattern of sbatch, which would make a file if any of it were executed."""
COMPARED = ("loss", "elbo", "grad_norm", "lr")
START_S = 240.0
"""Queue, check, torchrun and the imports of two ranks on two busy cores."""
ASK_S = 0.5
"""Seconds between two questions to the scheduler: each one starts a process, which the jobs would have to wait for."""


def copy_of_the_commands(home: Path, *, site: str) -> Path:
    """The repository's commands under another path, with a `slurm/site.env` of its own."""
    (home / "slurm").mkdir(parents=True)
    for source in (REPOSITORY / "slurm").iterdir():
        if source.is_file() and source.name != "site.env":
            (home / "slurm" / source.name).write_bytes(source.read_bytes())
            (home / "slurm" / source.name).chmod(source.stat().st_mode)
    for name in ("megadiff", "tools", "pretrain_dlm.py"):
        (home / name).symlink_to(REPOSITORY / name)
    (home / "slurm/site.env").write_text(
        f"MEGADIFF_PYTHON={sys.executable}\nMEGADIFF_HOST_PYTHON={sys.executable}\n{site}"
    )
    return home


def canaries(cluster: LocalCluster, *folders: Path) -> list[Path]:
    """Files that a name has made which was executed, where the commands were started or in these folders."""
    found = [path for folder in (*folders, cluster.folder) for path in folder.rglob("CANARY*")]
    return [*found, *REPOSITORY.glob("CANARY*")]


def submit(
    cluster: LocalCluster,
    home: Path,
    *arguments: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Id of the job that `slurm/submit ARGUMENTS` made, the first if there are two.

    Raises:
        AssertionError: it was refused.
    """
    return submit_all(cluster, home, *arguments, cwd=cwd, env=env)[0]


def submit_all(
    cluster: LocalCluster,
    home: Path,
    *arguments: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> list[str]:
    """Ids of all jobs that `slurm/submit ARGUMENTS` made; they need not follow each other, as tasks get ids too.

    Raises:
        AssertionError: it was refused.
    """
    command = [sys.executable, str(home / "slurm/submit"), *map(str, arguments)]
    environment = {**cluster.environment, **(env or {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)
    found = re.findall(r"^submitted job (\d+)[;,] ", done.stdout, flags=re.MULTILINE)
    assert found, done.stderr
    return found


def job_facts(cluster: LocalCluster, job: str) -> dict[str, str]:
    """`JobState`, `ExitCode`, `Restarts` and so on, as the scheduler has them."""
    shown = cluster.call("scontrol", "show", "job", "-o", job)
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def wait_for_end(cluster: LocalCluster, job: str, *, timeout_s: float = START_S) -> dict[str, str]:
    """The facts of a job that has ended for good."""
    wait_for_state(cluster, job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=timeout_s)
    return job_facts(cluster, job)


def wait_for_state(cluster: LocalCluster, job: str, *states: str, timeout_s: float) -> None:
    """Until the job is in one of these states."""
    wait_for(
        lambda: job_facts(cluster, job)["JobState"] in states,
        f"job {job} to be {' or '.join(states)}",
        timeout_s=timeout_s,
        every_s=ASK_S,
    )


def wait_until_gone(cluster: LocalCluster, *jobs: str, timeout_s: float) -> None:
    """Until none of the jobs, by the id of the array where it is one, is in the queue or runs."""
    wait_for(
        lambda: not set(jobs) & set(cluster.call("squeue", "-h", "-o", "%F").split()),
        f"the end of jobs {', '.join(jobs)}",
        timeout_s=timeout_s,
        every_s=ASK_S,
    )


class Training:
    """One run folder and the job that trains in it at present."""

    def __init__(self, cluster: LocalCluster, folder: Path, command: tuple[str | Path, ...], home: Path) -> None:
        self.cluster, self.folder, self.job, self.attempt = cluster, folder, "", 0
        self.jobs: list[str] = []
        self._command, self._home = command, home

    def submit(self, *overrides: str, cwd: Path) -> None:
        """Submit it, for the first time or again."""
        self.job, self.attempt = submit(self.cluster, self._home, *self._command, *overrides, cwd=cwd), 0
        self.jobs.append(self.job)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The training lines so far."""
        return [line for line in read_metrics(self.folder / "metrics.jsonl") if "loss" in line]

    @property
    def status(self) -> dict[str, Any]:
        """What `status.json` says; empty before there is one."""
        path = self.folder / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def is_running(self) -> bool:
        """Whether this job's present attempt trains, or a later one: a scheduler under load may end an attempt too."""
        status = self.status
        if str(status.get("job")) != self.job or status["attempt"] < self.attempt or status["state"] != "running":
            return False
        self.attempt = status["attempt"]
        return True

    def wait_until_running(self) -> None:
        """Until this attempt trains."""
        wait_for(self.is_running, f"attempt {self.attempt} of job {self.job}: {self.log()}", timeout_s=START_S)

    def wait_for_restart(self) -> None:
        """Until the attempt after this one trains."""
        self.attempt += 1
        self.wait_until_running()

    def wait_for_steps(self, more: int) -> int:
        """Until this attempt has taken so many steps more than there were lines; the last step then."""
        self.wait_until_running()
        before = self.lines[-1]["step"] if self.lines else 0
        wait_for(
            lambda: bool(self.lines) and self.lines[-1]["step"] >= before + more,
            f"step {before + more}: {self.log()}",
            timeout_s=START_S,
            every_s=0.05,
        )
        return self.lines[-1]["step"]

    def rank(self, number: int) -> psutil.Process:
        """The process of one rank of the present attempt."""
        for process in psutil.process_iter(["cmdline"]):
            if any("pretrain_dlm.py" in word for word in process.info["cmdline"] or []):
                try:
                    environment = process.environ()
                except psutil.Error:
                    continue
                if (environment.get("SLURM_JOB_ID"), environment.get("RANK")) == (self.job, str(number)):
                    return process
        raise AssertionError(f"no rank {number} of job {self.job}")

    def log(self) -> str:
        """What the batch scripts and the ranks have said, by file."""
        logs = sorted((self.folder / "slurm").glob(f"{self.job}.*"))
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in logs)

    def batch_log(self) -> str:
        """What this job's batch script has said in all attempts."""
        return (self.folder / "slurm" / f"{self.job}.out").read_text()

    def resumed_after(self) -> int:
        """The step after which the present attempt went on."""
        log = (self.folder / "slurm" / f"{self.job}.{self.attempt}.node0.log").read_text()
        found = re.search(r"resuming from .*? after step (\d+) of", log, flags=re.DOTALL)  # of a path with newlines
        assert found is not None, log
        return int(found.group(1))


def curve_of(lines: list[dict[str, Any]]) -> list[list[float]]:
    """Step and compared figures of training lines."""
    return [[line["step"], *(line[key] for key in COMPARED)] for line in lines]
