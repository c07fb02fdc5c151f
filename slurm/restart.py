"""Decide after an attempt of a training job whether it is done or Slurm is to run it again.

    restart.py begin|decide|timed-out|lingers RUN MAX_RESTARTS

pretrain.sh runs this on the batch host, with Python 3.7 or newer and no packages. It prints one sentence for the log
and
ends with the job's exit code, or with 75 if the job is to run again. `begin` records the start of an attempt, and
`decide` judges it after its end. While ranks are still running, `timed-out` returns 75 if they are being ended because
of the time limit, and `lingers` returns 75 if the trainer ended long ago; otherwise both return 0.

The cause of an end is derived from three sources, none of which is an exit code (torchrun's is 1 for any failure):

- RUN/status.json, written by the trainer: finished, stopped, failed, no_restart, or still running after a sudden death.
  It counts only if this job and this attempt wrote it.
- RUN/LATEST, the newest checkpoint: if 3 restarts bring no newer one, the run is abandoned.
- The scheduler. A preempted job stays RUNNING during its grace time, and is restarted only if it requests that, which
  it does. Once the job is no longer RUNNING, its end was decided elsewhere. If the scheduler's restart count is above
  this attempt's, that was a preemption, a lost node or `scontrol requeue`, and the job is in the queue already. If not,
  the time limit has passed or a user cancelled the job. Both show COMPLETING, the shell gets TERM for both, and
  `scontrol requeue` would revive a cancelled job, so they are distinguished by the end time: a cancel sets it to the
  moment of the cancel, which is before the limit.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REQUEUE, GIVE_UP = 75, 93
MAX_WITHOUT_PROGRESS = 3
STOP_FILE = "STOP"
LINGER_S = float(os.environ.get("MEGADIFF_LINGER_S", "600"))
"""Seconds after the trainer's end before a remaining node is abandoned: longer than the slowest save, and than the
scheduler takes to notice a lost node (SlurmdTimeout, 300 s by default)."""
ASKS, ASK_AGAIN_S = 10, 15
"""Number of queries and seconds between them: a controller that restarts does not answer for a while."""


class Verdict(NamedTuple):
    """The exit code of the batch script, and the reason for it."""

    code: int
    reason: str


class Attempt(NamedTuple):
    """This start of the job."""

    run: Path
    job: str
    """Job id for the scheduler's commands: `12`, or `12_3` for a task of an array."""
    number: int
    """Number of restarts so far."""
    max_restarts: int
    """Largest number of restarts after a crash; those after a stop at the time limit or a preemption are not
    counted."""

    @property
    def history(self) -> Path:
        """File with a line for each start of this job and each crash."""
        return self.run / "slurm" / f"{self.job}.attempts.jsonl"


class Scheduled(NamedTuple):
    """The job as the scheduler sees it."""

    state: str
    restarts: int
    end_time: float | None
    """Unix time of its end, which lies in the past for a job that was ended."""


def latest_step(run: Path) -> int:
    """Return the step of the newest checkpoint; -1 if there is none."""
    found = re.match(r"step_(\d{1,18})$", read_small(run / "LATEST", 200).strip())
    return int(found.group(1)) if found else -1


def read_small(path: Path, most: int) -> str:
    """Return the content of a regular file of limited size in bytes; empty if there is no such file."""
    try:
        descriptor = os.open(str(path), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            text = file.read(most + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except OSError:
        return ""
    return text.decode("utf-8", "replace") if len(text) <= most else ""


def read_status(attempt: Attempt, own_id: str) -> dict[str, object]:
    """Return the status that the trainer wrote in this attempt; empty if it wrote none."""
    try:
        status = json.loads(read_small(attempt.run / "status.json", 2**20))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(status, dict):
        return {}
    is_own = (str(status.get("job")), str(status.get("attempt"))) == (own_id, str(attempt.number))
    return status if is_own else {}


def read_history(attempt: Attempt) -> list[dict[str, int]]:
    """Return the history of this job's attempts, without lines that a crash has cut short."""
    lines = []
    if attempt.history.exists():
        for line in attempt.history.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    return lines


def note(attempt: Attempt, **facts: int) -> None:
    """Add a line to the history; a full disk does not end the job."""
    try:
        with attempt.history.open("a") as file:
            file.write(json.dumps({"attempt": attempt.number, **facts}) + "\n")
    except OSError as error:
        sys.stdout.write(f"{attempt.history} cannot be written: {error.strerror}\n")


def restarts_without_progress(attempt: Attempt) -> int:
    """Return the number of restarts since the newest checkpoint first existed; 0 if this attempt wrote it."""
    starts = [line for line in read_history(attempt) if "step" in line]
    best = max((line["step"] for line in starts), default=-1)
    if not starts or latest_step(attempt.run) > best:
        return 0
    return attempt.number - min(line["attempt"] for line in starts if line["step"] == best)


def begin(attempt: Attempt) -> Verdict:
    """Record the start; refuse it if restarts that others caused (lost nodes) brought no progress either."""
    note(attempt, step=latest_step(attempt.run))
    if restarts_without_progress(attempt) > MAX_WITHOUT_PROGRESS:
        return _doomed(attempt)
    return Verdict(0, f"the newest checkpoint is {_newest(attempt.run)}")


def decide(attempt: Attempt, status: dict[str, object], job: Scheduled | None, limit: float | None) -> Verdict:
    """Return the verdict on an attempt that has ended.

    Args:
        status: the result of `read_status`.
        job: None if the scheduler does not answer; a restart is then requested.
        limit: Unix time at which the time limit ends, if there is one.
    """
    state = status.get("state")
    if state == "finished":
        return Verdict(0, "the run is finished")
    if state == "no_restart":
        return Verdict(_exit_code(status), f"the run must not be started again: {status.get('reason')}")
    if job is not None and job.state != "RUNNING":
        return decided_elsewhere(attempt, job, limit)
    if (attempt.run / STOP_FILE).exists() or str(status.get("reason")).startswith("stop file"):
        return Verdict(0, "the run was stopped by its stop file; without that file, submit it again to resume")
    if state != "stopped":
        note(attempt, crash=1)
        crashes = sum("crash" in line for line in read_history(attempt))
        if crashes > attempt.max_restarts:
            return Verdict(GIVE_UP, f"{crashes} crashes, {attempt.max_restarts} restarts allowed: given up")
    if restarts_without_progress(attempt) >= MAX_WITHOUT_PROGRESS:
        return _doomed(attempt)
    detail = f"{state}: {status.get('reason')}" if status else "it died before the trainer could write its status"
    return Verdict(REQUEUE, f"the run continues in another attempt from {_newest(attempt.run)} ({detail})")


def decided_elsewhere(attempt: Attempt, job: Scheduled, limit: float | None) -> Verdict:
    """Return the verdict on a job that the scheduler is ending or has ended."""
    if job.restarts > attempt.number:
        return Verdict(0, "the scheduler has put this job back into the queue")
    if limit is not None and job.end_time is not None and job.end_time >= limit:
        return Verdict(REQUEUE, "the time limit has passed; the run continues in another attempt")
    return Verdict(0, "this job was cancelled; submit the run again to resume")


def lingers(attempt: Attempt, status: dict[str, object]) -> Verdict:
    """Return the verdict while ranks or srun still run: to end them if the trainer ended long ago."""
    if status.get("state", "running") == "running":
        return Verdict(0, "")
    age = time.time() - (attempt.run / "status.json").stat().st_mtime
    if age < LINGER_S:
        return Verdict(0, "")
    return Verdict(
        REQUEUE, f"the trainer ended {age:.0f} s ago ({status['state']}), but a node did not; no longer waiting for it"
    )


def ask_scheduler(job: str) -> Scheduled | None:
    """Return the scheduler's view of the job, or None if it does not answer.

    None of the queried fields contains a name chosen by the user.
    """
    command = ["squeue", "-h", "-j", job, "-O", "State:30,RestartCnt:20,EndTime:30"]
    for _ in range(ASKS):
        done = subprocess.run(command, capture_output=True, text=True)
        fields = done.stdout.split()
        if done.returncode == 0 and len(fields) == 3:
            return Scheduled(fields[0], int(fields[1]), _unix_time(fields[2]))
        time.sleep(ASK_AGAIN_S)
    return None


def _unix_time(text: str) -> float | None:
    """Return the Unix time of the scheduler's local time; None for other texts, such as NONE and N/A."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _exit_code(status: dict[str, object]) -> int:
    code = status.get("exit_code")
    return code if isinstance(code, int) and code not in (0, REQUEUE) else 1


def _newest(run: Path) -> str:
    step = latest_step(run)
    return "none" if step < 0 else f"step {step}"


def _doomed(attempt: Attempt) -> Verdict:
    count = restarts_without_progress(attempt)
    return Verdict(GIVE_UP, f"{count} restarts without a newer checkpoint than {_newest(attempt.run)}: given up")


def main() -> int:
    """Run one of the four commands."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.stdout.write(__doc__ or "")
        return 0
    if len(sys.argv) != 4:
        sys.stderr.write("error: restart.py needs begin, decide, timed-out or lingers, a run folder and a count\n")
        return 2
    command, run, max_restarts = sys.argv[1:]
    own_id, job = os.environ["SLURM_JOB_ID"], os.environ["MEGADIFF_JOB"]
    attempt = Attempt(Path(run), job, int(os.environ.get("SLURM_RESTART_COUNT", "0")), int(max_restarts))
    limit = float(os.environ["SLURM_JOB_END_TIME"]) if "SLURM_JOB_END_TIME" in os.environ else None
    if command == "begin":
        verdict = begin(attempt)
    elif command == "lingers":
        verdict = lingers(attempt, read_status(attempt, own_id))
    elif command == "timed-out":
        scheduled = ask_scheduler(job)
        if scheduled is None or scheduled.state == "RUNNING":
            return 0
        verdict = decided_elsewhere(attempt, scheduled, limit)
    else:
        verdict = decide(attempt, read_status(attempt, own_id), ask_scheduler(job), limit)
    if verdict.reason:
        sys.stdout.write(f"{time.strftime('%F %T')} {verdict.reason}\n")
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())
