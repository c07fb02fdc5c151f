"""The sbatch command for the arguments of slurm/submit, and its submission.

No shell is involved, and a user's input never becomes part of interpreted text: sbatch gets an argument list and passes
the batch script its arguments unchanged, and array tasks read theirs from files of NUL-terminated fields.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megadiff.config.load import load_config
from megadiff.data.corpus_streams import corpus_path
from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig

MAX_LEAD_S = 65_535
"""Largest lead in seconds: Slurm stores it in 16 bits."""
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?|(?P<parts>\d+(?::\d+){0,2}))")
_DEPENDENCY = re.compile(r"[a-z]+(:[0-9_+]+)*([,?][a-z]+(:[0-9_+]+)*)*")


@dataclass(frozen=True)
class Job:
    """One submission."""

    home: Path
    kind: str
    name: str
    logs: Path
    options: list[str]
    """Options of sbatch."""
    arguments: list[str]
    """Arguments of the batch script after the repository."""
    tasks: list[list[str]] = field(default_factory=list)
    """Fields of each array task; empty for a job that is not an array."""
    then: Job | None = None
    """Job that begins when this one has succeeded, if any."""

    @property
    def command(self) -> list[str]:
        """Argument list of sbatch."""
        log = "%A_%a.out" if self.tasks else "%j.out"
        printable = "".join(c if c.isprintable() else "_" for c in self.name)
        return [
            "sbatch",
            "--parsable",
            f"--job-name={printable}",
            f"--output={escape_pattern(self.logs)}/{log}",
            *self.options,
            str(self.home / "slurm" / f"{self.kind}.sbatch"),
            str(self.home),
            *self.arguments,
        ]


def escape_pattern(path: Path) -> str:
    """Return a folder as part of sbatch's file name pattern, in which `%` begins a replacement.

    Raises:
        ConfigError: the path has a backslash, with which Slurm turns all replacements off.
    """
    if "\\" in str(path):
        raise ConfigError(
            f"--logs {path}: Slurm cannot write to a file with a backslash in its name; choose another folder"
        )
    return str(path).replace("%", "%%")


def seconds_of(text: str) -> int:
    """Return the seconds of a time limit in sbatch's format.

    Raises:
        ConfigError: the text has another format, or is zero.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ConfigError(f"--time {text}: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS is wanted")
    if found["parts"] is not None:
        parts = [int(part) for part in found["parts"].split(":")]
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        days = 0
    else:
        days, hours, minutes, seconds = (int(found[part] or 0) for part in ("days", "dh", "dm", "ds"))
    limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if limit == 0:
        raise ConfigError(f"--time {text}: a limit above zero is wanted; 0 would mean none")
    return limit


def build_job(requested: argparse.Namespace, *, home: Path) -> Job:
    """Check the arguments and build the submission.

    Raises:
        ConfigError: a number, a time or a file is not valid.
    """
    _check_numbers(requested)
    limit = seconds_of(requested.time)
    if requested.job in ("pretrain", "sweep") and requested.lead >= limit:
        raise ConfigError(f"--lead {requested.lead}: the time limit is {limit} s, so a lead below that is wanted")
    build = {"pretrain": _pretrain, "sweep": _sweep, "preprocess": _preprocess, "evaluate": _evaluate}
    return build.get(requested.job, _convert)(requested, home)


def _check_numbers(requested: argparse.Namespace) -> None:
    limits = {
        "nodes": 1,
        "gpus_per_node": 0,
        "cpus_per_task": 1,
        "lead": 1,
        "max_restarts": 0,
        "at_once": 1,
        "tasks": 1,
    }
    for key, least in limits.items():
        value = getattr(requested, key, None)
        if value is not None and value < least:
            raise ConfigError(f"--{key.replace('_', '-')} {value}: a number of at least {least} is wanted")
    if getattr(requested, "lead", 0) > MAX_LEAD_S:
        raise ConfigError(f"--lead {requested.lead}: Slurm takes at most {MAX_LEAD_S} seconds")
    if requested.dependency is not None and not _DEPENDENCY.fullmatch(requested.dependency):
        raise ConfigError(f"--dependency {requested.dependency}: a list such as afterok:123:124,afterany:125 is wanted")


def _options(requested: argparse.Namespace, home: Path) -> list[str]:
    site = site_defaults(home / "slurm/site.env")
    values = {
        "nodes": getattr(requested, "nodes", None),
        "gpus-per-node": requested.gpus_per_node or None,
        "cpus-per-task": requested.cpus_per_task,
        "time": requested.time,
        "partition": requested.partition or site.get("MEGADIFF_PARTITION"),
        "account": requested.account or site.get("MEGADIFF_ACCOUNT"),
        "dependency": requested.dependency,
        "signal": f"USR2@{requested.lead}" if hasattr(requested, "lead") else None,
    }
    return [f"--{name}={value}" for name, value in values.items() if value] + requested.sbatch


def site_defaults(path: Path) -> dict[str, str]:
    """Read `MEGADIFF_ACCOUNT=` and `MEGADIFF_PARTITION=` from the site's file, without running it."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        name, equals, value = line.removeprefix("export ").partition("=")
        if equals and name in ("MEGADIFF_ACCOUNT", "MEGADIFF_PARTITION"):
            words = shlex.split(value, comments=True)
            found[name] = words[0] if words else ""
    return found


def _pretrain(requested: argparse.Namespace, home: Path) -> Job:
    run = _run_folder(requested, requested.more)
    arguments = [str(run), str(requested.max_restarts), *_pretrain_arguments(requested.config, requested.more)]
    return Job(
        home, "pretrain", _name(requested, run.name), _logs(requested, run), _options(requested, home), arguments
    )


def _sweep(requested: argparse.Namespace, home: Path) -> Job:
    runs: dict[Path, int] = {}
    tasks = []
    for number, row in read_rows(Path(requested.rows)):
        overrides = [*requested.more, *row]
        run = _run_folder(requested, overrides)
        if run in runs:
            raise ConfigError(
                f"{requested.rows}:{number}: the run folder {run} is that of line {runs[run]} too; "
                "give each row its own name=..."
            )
        runs[run] = number
        tasks.append([str(run), *_pretrain_arguments(requested.config, overrides)])
    name = _name(requested, f"sweep-{Path(requested.rows).stem}")
    logs = _logs(requested, next(iter(runs)).parent / name)
    options = [*_options(requested, home), _array(tasks, requested)]
    return Job(home, "sweep", name, logs, options, [str(logs), str(requested.max_restarts)], tasks)


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Return the `key=value` words of each line, quoted as in a shell, with its line number; `#` begins a comment.

    Raises:
        ConfigError: the file cannot be read, has no row, or has a row with an unclosed quote.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        split = [(number, shlex.split(line, comments=True)) for number, line in enumerate(lines, 1)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--rows {path}: {getattr(error, 'strerror', None) or error}") from None
    rows = [(number, row) for number, row in split if row]
    if not rows:
        raise ConfigError(f"--rows {path}: no row of overrides; a line such as `name=a optimizer.lr=1e-3` is wanted")
    return rows


def _preprocess(requested: argparse.Namespace, home: Path) -> Job:
    if requested.output_prefix is None and requested.shards is None:
        raise ConfigError("--output-prefix P is wanted for one file, or --shards DIR for a folder of shards")
    shards = Path(requested.shards or f"{requested.output_prefix}-shards").absolute()
    for file in requested.input:
        if isinstance(corpus_path(file), Path) and not Path(file).exists():
            raise ConfigError(f"--input {file}: there is no such file or folder")
    paths = [corpus_path(file) for file in requested.input]
    inputs = ["--input", *(os.path.abspath(path) if isinstance(path, Path) else str(path) for path in paths)]
    fixed = [str(shards), *inputs, f"--shards={shards}", f"--tokenizer={requested.tokenizer}"]
    if requested.cpus_per_task and not any(word.partition("=")[0] == "--workers" for word in requested.more):
        fixed.append(f"--workers={requested.cpus_per_task}")
    tasks = [[*fixed, *requested.more]] * requested.tasks
    logs = _logs(requested, shards.parent) if requested.logs else shards.parent / "slurm" / shards.name
    options = [*_options(requested, home), _array(tasks, requested)]
    name = _name(requested, f"preprocess-{shards.name}")
    merging = None if requested.output_prefix is None else _merge(requested, home, shards, logs)
    return Job(home, "preprocess", name, logs, options, [str(logs)], tasks, then=merging)


def _merge(requested: argparse.Namespace, home: Path, shards: Path, logs: Path) -> Job:
    prefix = Path(requested.output_prefix).absolute()
    alone = argparse.Namespace(**{**vars(requested), "cpus_per_task": None, "dependency": None, "gpus_per_node": 0})
    arguments = [f"--merge={shards}", f"--output-prefix={prefix}"]
    return Job(home, "merge", _name(requested, f"merge-{prefix.name}"), logs, _options(alone, home), arguments)


def _evaluate(requested: argparse.Namespace, home: Path) -> Job:
    model = _folder(requested.model, "--model")
    arguments = ["elbo", f"--model={model}", f"--data={requested.data}", *requested.more]
    name = _name(requested, f"evaluate-{model.name}")
    return Job(home, "evaluate", name, _logs(requested, model), _options(requested, home), arguments)


def _convert(requested: argparse.Namespace, home: Path) -> Job:
    checkpoint, output = _folder(requested.checkpoint, "--checkpoint"), Path(requested.output).absolute()
    arguments = ["export", f"--checkpoint={checkpoint}", f"--output={output}", *requested.more]
    name = _name(requested, f"convert-{checkpoint.name}")
    return Job(home, "convert", name, _logs(requested, output.parent), _options(requested, home), arguments)


def _run_folder(requested: argparse.Namespace, overrides: Sequence[str]) -> Path:
    config = load_config(requested.config, overrides, RunConfig)
    limit = seconds_of(requested.time)
    if config.stop.grace_period_s >= limit:
        raise ConfigError(
            f"stop.grace_period_s is {config.stop.grace_period_s:g}, and the time limit {limit} s: the run would "
            "stop before its first step; give a longer --time or a smaller stop.grace_period_s"
        )
    return config.folder.absolute()


def _pretrain_arguments(config: str, overrides: Sequence[str]) -> list[str]:
    return [f"--config={Path(config).absolute()}", *overrides]


def _folder(text: str, option: str) -> Path:
    path = Path(text).absolute()
    if not path.is_dir():
        raise ConfigError(f"{option} {text}: there is no such folder")
    return path


def _name(requested: argparse.Namespace, default: str) -> str:
    return requested.job_name or default


def _logs(requested: argparse.Namespace, beside: Path) -> Path:
    return Path(requested.logs).absolute() if requested.logs else beside / "slurm"


def _array(tasks: Sequence[object], requested: argparse.Namespace) -> str:
    return f"--array=0-{len(tasks) - 1}" + (f"%{requested.at_once}" if requested.at_once else "")


def _environment() -> dict[str, str]:
    """Return this environment without the variables of a job that submits another one.

    Slurm sets some of these only at a restart, so they must not be inherited.
    """
    return {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}


def submit(job: Job, *, dry_run: bool) -> None:
    """Print the commands, or create the log folder, write the tasks and pass the job to sbatch, then what follows it.

    Raises:
        ConfigError: there is no sbatch here, or it refuses the job.
    """
    if dry_run:
        print(shlex.join(job.command))
        for number, fields in enumerate(job.tasks):
            print(f"# task {number}: {shlex.join(fields)}")
        if job.then is not None:
            print(f"# then: {shlex.join(_after(job.then, 'JOB').command)}")
        return
    job.logs.mkdir(parents=True, exist_ok=True)
    for number, fields in enumerate(job.tasks):
        (job.logs / f"task-{number}.args").write_bytes(b"".join(os.fsencode(text) + b"\0" for text in fields))
    number = _passed_to_sbatch(job)
    print(f"submitted job {number}; logs in {job.logs}")
    if job.then is not None:
        print(f"submitted job {_passed_to_sbatch(_after(job.then, number))}, which begins when job {number} is done")


def _after(job: Job, number: str) -> Job:
    """Return a job that waits for the success of another one, and disappears if that fails."""
    return replace(job, options=[*job.options, f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes"])


def _passed_to_sbatch(job: Job) -> str:
    """Pass a job to sbatch and return its id."""
    try:
        done = subprocess.run(job.command, env=_environment(), capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError("there is no sbatch here; run slurm/submit on a login node, or look with --dry-run") from None
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
