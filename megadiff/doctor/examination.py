"""Findings of the doctor: the subject of an examination, its checks in isolation, the printed report."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megadiff.errors import MegadiffError
from megadiff.run.config import RunConfig

if TYPE_CHECKING:
    from megadiff.data.tokenizers import Tokenizer
    from megadiff.platform.machine import Platform


Level = Literal["OK", "WARN", "FAIL"]

LIMIT_S = 60.0
"""Timeout per check in seconds; a hung network file system never returns."""

_COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The result of a check: fine, a warning, or a problem on which a run would fail."""

    level: Level
    text: str
    """Result in one line: the thing checked and its state."""
    remedy: str = ""
    """Advice on how to solve the problem; empty only if all is well."""
    check: str = ""
    """Name of the check that produced this; filled in by the examination."""


def ok(text: str) -> Finding:
    """Return a finding that all is well."""
    return Finding("OK", text)


def warn(text: str, remedy: str) -> Finding:
    """Return a finding that a run would start, but not run as well as it could."""
    return Finding("WARN", text, remedy)


def fail(text: str, remedy: str) -> Finding:
    """Return a finding that a run would not start, or would not end well."""
    return Finding("FAIL", text, remedy)


@dataclass(frozen=True)
class Subject:
    """Inputs of the checks; expensive values are cached."""

    environment: Mapping[str, str]
    """Environment of the process, including the variables of the launcher and the scheduler."""
    config: RunConfig | None = None
    """Configuration of the run; None if none was given or it cannot be read."""
    problem: str | None = None
    """Reason why the run description cannot be read."""
    wanted_ranks: int | None = None
    """Number of ranks of the run on all nodes, if the user gave it; otherwise the launcher's or the scheduler's
    counts."""
    now: Callable[[], float] = time.time
    """Clock of this machine, seconds since 1970."""
    shared_memory: Path = Path("/dev/shm")
    """Folder of the memory that processes of a node share."""

    @property
    def nodes(self) -> int:
        """Number of nodes of the job according to SLURM; 1 without it."""
        return self._number("SLURM_JOB_NUM_NODES") or self._number("SLURM_NNODES") or 1

    @property
    def ranks(self) -> int:
        """Number of ranks of the run."""
        return self.wanted_ranks or self._number("WORLD_SIZE") or self._number("SLURM_NTASKS") or 1

    @property
    def local_ranks(self) -> int:
        """Number of ranks on this node."""
        return -(-self.ranks // self.nodes)

    @cached_property
    def platform(self) -> Platform:
        """The machine; reading it raises `PlatformError` if the run requires another one."""
        from megadiff.platform.machine import detect

        if self.config is None:
            return detect(layers="auto")
        return detect(self.config.platform, layers=self.config.wanted_transformer_impl)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The run's tokenizer, None without a run; reading it raises `DataError` if it cannot be loaded."""
        from megadiff.data.tokenizers import load_tokenizer

        return load_tokenizer(self.config.data.tokenizer) if self.config is not None else None

    @cached_property
    def vocab_size(self) -> int | None:
        """Number of token ids including the mask: the tokenizer's, or the one in the run description; None without
        either."""
        if self.config is None:
            return None
        if self.config.data.vocab_size is not None:
            return self.config.data.vocab_size
        from megadiff.errors import DataError

        try:
            return self.tokenizer.vocab_size if self.tokenizer is not None else None
        except DataError:
            return None  # reported by the check of the tokenizer

    @cached_property
    def existing_folder(self) -> Path:
        """Run folder, or the nearest existing folder above it; the working folder without a run."""
        if self.config is None:
            return Path.cwd()
        wanted = self.config.folder.absolute()
        return next(folder for folder in (wanted, *wanted.parents) if folder.exists())

    def _number(self, variable: str) -> int | None:
        text = self.environment.get(variable, "")
        return int(text) if text.isdecimal() and int(text) > 0 else None


Check = Callable[[Subject], Iterable[Finding]]
"""A check of a subject. What it raises becomes a finding: a `MegadiffError` its own, anything else a failure of it."""


def all_checks() -> dict[str, Check]:
    """Return the checks of the machine and of a run by name, in the order of their names."""
    from megadiff.doctor import machine, run

    functions = {**vars(machine), **vars(run)}
    return {name.removeprefix("check_"): functions[name] for name in sorted(functions) if name.startswith("check_")}


def examine(
    subject: Subject, *, checks: Mapping[str, Check] | None = None, limit_s: float = LIMIT_S
) -> Iterator[Finding]:
    """Yield all findings, check by check; by default of all checks."""
    for name, check in (all_checks() if checks is None else checks).items():
        found: list[Finding] = []
        # A daemon thread, because a system call that never returns must not keep the process alive.
        thread = threading.Thread(target=_gather, args=(check, subject, found), daemon=True)
        thread.start()
        thread.join(limit_s)
        if thread.is_alive():
            found = [
                *found,
                fail(
                    f"no answer in {limit_s:.0f} s",
                    "check the disk and host it uses for a hang",
                ),
            ]
        yield from (replace(finding, check=name) for finding in found)


def _gather(check: Check, subject: Subject, found: list[Finding]) -> None:
    try:
        for finding in check(subject):
            found.append(finding)
    except MegadiffError as error:
        found.append(fail(_one_line(str(error)), "correct the setting that the message names"))
    except BaseException as error:  # some libraries raise errors that are no Exceptions; report these too
        found.append(
            fail(
                f"the check itself failed ({type(error).__name__}: {_one_line(str(error))})",
                "the other findings are valid; install the library if one is missing, else report this",
            )
        )


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def plain_line(finding: Finding) -> str:
    """Return a finding as one line of a log."""
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    return f"{finding.level:<4} {finding.check:<14} {finding.text}{remedy}"


def table(findings: Sequence[Finding]) -> Table:
    """Return a table for people; text in findings is not interpreted as markup."""
    drawn = Table("", "check", "found", "what to do", show_lines=False)
    for finding in findings:
        level = Text(finding.level, style=_COLOURS[finding.level])
        drawn.add_row(level, finding.check, Text(finding.text), Text(finding.remedy))
    return drawn


def summary(findings: Sequence[Finding]) -> str:
    """Return the number of findings of each level, in one line."""
    counts = {level: sum(finding.level == level for finding in findings) for level in _COLOURS}
    return f"{counts['OK']} fine, {counts['WARN']} warning(s), {counts['FAIL']} failure(s)"


def as_json(findings: Sequence[Finding]) -> str:
    """Return JSON for programs: `findings`, and in `failed` whether one of them is a failure."""
    return json.dumps({"failed": has_failed(findings), "findings": [asdict(finding) for finding in findings]}, indent=1)


def has_failed(findings: Sequence[Finding]) -> bool:
    """Return whether a run would fail."""
    return any(finding.level == "FAIL" for finding in findings)


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print a table on a terminal, plain lines elsewhere."""
    if console.is_terminal:
        console.print(table(findings))
    else:
        for finding in findings:
            console.out(plain_line(finding), highlight=False)
    console.out(summary(findings), highlight=False)
