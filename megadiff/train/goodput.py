"""Goodput: the share of a run's wall time spent in steps that counted, over all its attempts, and where the rest went.

An attempt is one process life of the run. Each keeps a record in `RUN/goodput.json`, written again at every call of
`write`, so that a killed one has recorded nearly all. A step counts once: steps that a restart repeats, because its
checkpoint is older than the last step, are `lost`.

The save interval is suggested by Young and Daly: a compromise between saving too often and repeating too much after a
failure. Symbols: C seconds that training pauses for one save, M mean seconds between failures, R seconds from a failure
to the next step, tau seconds of training between two saves. Failures come at random (exponential gaps of mean M).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from megadiff.files import read_bytes, write_atomically
from megadiff.train.config import GoodputConfig

log = logging.getLogger("megadiff")

Phase = Literal["setup", "step", "wait_for_data", "evaluate", "save_stall", "lost"]
AttemptEnd = Literal["finished", "stopped", "failed"]
PHASES: tuple[Phase, ...] = ("setup", "step", "wait_for_data", "evaluate", "save_stall", "lost")
_MAX_BYTES = 2**24
_Seconds = Annotated[float, Field(ge=0, le=1e12)]
_Count = Annotated[int, Field(ge=0, le=10**15)]
_FIRST_ORDER_UP_TO = 0.01
"""C / M up to which Young's form is as good as Daly's."""


class Attempt(BaseModel):
    """Record of one process life of the run; seconds throughout."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    started: float
    """Wall clock, seconds since 1970."""
    updated: float
    """Wall clock of the last line."""
    elapsed_s: _Seconds = 0.0
    """Seconds from the start to the last line, on a monotonic clock."""
    down_s: _Seconds = 0.0
    """Seconds between the last line of the attempt before and this start; 0 after one that finished."""
    last_step: _Count = 0
    """The last step taken; 0 for none."""
    steps: _Count = 0
    """Number of steps taken, repeated ones included."""
    phases: dict[str, _Seconds] = Field(default_factory=dict)
    """Seconds by phase."""
    saves: _Count = 0
    """Number of checkpoints completed."""
    save_s: _Seconds = 0.0
    """Seconds from beginning to completion, summed over checkpoints; training pauses for `save_stall` of them."""
    ended: AttemptEnd | None = None
    """End of the attempt; None while it runs, and afterwards if it was killed."""

    @property
    def has_failed(self) -> bool:
        """Whether an attempt that is over was killed or ended with an error."""
        return self.ended in (None, "failed")

    def in_phase(self, phase: Phase) -> float:
        """Return the seconds of a phase."""
        return self.phases.get(phase, 0.0)


_LIST = TypeAdapter(list[Attempt])


def write_attempts(path: Path, attempts: Sequence[Attempt]) -> None:
    """Replace the file in one step.

    Not synced: this may not stall a step, and a file torn by a crash of the machine costs only statistics.

    Raises:
        OSError: the disk refuses.
    """
    write_atomically(path, _LIST.dump_json(list(attempts), indent=1) + b"\n", is_durable=False)


def read_attempts(path: Path) -> list[Attempt]:
    """Return the records of a `goodput.json`, oldest first; none if it is missing.

    A torn or damaged file is set aside as `goodput.json.bad`, with a warning: it holds nothing a run depends on.
    """
    try:
        return _LIST.validate_json(read_bytes(path, max_bytes=_MAX_BYTES))
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning(f"{path} cannot be read ({error.strerror or error}); the goodput is counted from here on")
        return []
    except (ValidationError, ValueError) as error:
        aside = path.with_name(f"{path.name}.bad")
        log.warning(
            f"{path} is damaged ({str(error).splitlines()[0]}); set aside as {aside.name}, counted from here on"
        )
    try:
        path.replace(aside)
    except OSError:
        log.warning(f"{path} could not be set aside")
    return []


def young(save_cost_s: float, mtbf_s: float) -> float:
    """Return tau = sqrt(2 C M), to first order in C / M.

    Source: J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.
    """
    return math.sqrt(2 * save_cost_s * mtbf_s)


def daly(save_cost_s: float, mtbf_s: float) -> float:
    """Return tau = sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C; M where C is 2 M or more.

    Source: J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation
    Computer Systems 22(3), 2006, equation 37.
    """
    if save_cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_cost_s / (2 * mtbf_s)
    return young(save_cost_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_cost_s


def best_interval(save_cost_s: float, mtbf_s: float) -> float:
    """Return the seconds of training between saves: Young's while a save is cheap against M, Daly's beyond."""
    form = young if save_cost_s <= _FIRST_ORDER_UP_TO * mtbf_s else daly
    return form(save_cost_s, mtbf_s)


def expected_loss(interval_s: float, save_cost_s: float, mtbf_s: float, *, restart_s: float = 0.0) -> float:
    """Return the fraction of wall time, 0 to 1, that saves, repeated work and restarts take.

    To get tau seconds of work and their save done takes M exp(R / M) (exp((tau + C) / M) - 1) seconds on average
    (Daly 2006, equation 20); to first order the loss is C / tau + tau / 2M + R / M.
    """
    exponent = (interval_s + save_cost_s) / mtbf_s
    if exponent + restart_s / mtbf_s > 700:  # exp would overflow: no work is ever finished
        return 1.0
    return 1 - interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(exponent))


@dataclass(frozen=True)
class Suggestion:
    """The save interval that loses least."""

    seconds: float
    """Seconds of training between two saves."""
    steps: int
    """Number of steps between two saves at the measured time of a step, at least 1."""
    loss: float
    """Fraction of wall time lost to saves, repeated steps and restarts with this interval."""
    loss_now: float
    """Fraction lost with the interval that the run has."""


class Goodput:
    """Record of where the time of this attempt goes, beside the records of the attempts before it.

    Args:
        path: `RUN/goodput.json`; None on ranks other than the main one, where nothing is read or written.
        config: the section `goodput`.
        save_every: steps between checkpoints, as configured.
        before_s: seconds of this attempt that have passed already, in imports and the like; they count as setting up.
        wall, tick: clocks in seconds; `wall` may be set while the run goes on, `tick` never goes back.
    """

    def __init__(
        self,
        path: Path | None,
        config: GoodputConfig,
        *,
        save_every: int,
        before_s: float = 0.0,
        wall: Callable[[], float] = time.time,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._config, self._save_every = path, config, save_every
        self._wall, self._tick = wall, tick
        self._began = tick() - before_s
        self._has_complained = False
        before = read_attempts(path) if path is not None else []
        now = wall() - before_s
        down = now - before[-1].updated if before and before[-1].ended != "finished" else 0.0
        self._now = Attempt(started=now, updated=now, down_s=max(0.0, down))
        self._reached = max((attempt.last_step for attempt in before), default=0)
        self.attempts = [*before, self._now]
        if before_s:
            self.spent("setup", before_s)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Count the time of the block, also when it ends with an exception."""
        start = self._tick()
        try:
            yield
        finally:
            self.spent(phase, self._tick() - start)

    def spent(self, phase: Phase, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self._now.phases[phase] = self._now.in_phase(phase) + seconds

    def step_taken(self, step: int, seconds: float, *, waited_s: float = 0.0) -> None:
        """Count one optimizer step.

        Args:
            step: steps taken so far, this one included.
            seconds: wall time of the step, its batch included.
            waited_s: the part of it that passed waiting for the batch.
        """
        if step <= self._reached:
            self.spent("lost", seconds)
        else:
            self.spent("step", seconds - waited_s)
            self.spent("wait_for_data", waited_s)
        self._now.last_step = step
        self._now.steps += 1

    def save_completed(self, seconds: float, *, stall_s: float) -> None:
        """Count one checkpoint.

        Args:
            seconds: from its beginning to its completion.
            stall_s: the part of it for which training paused; all of it unless files are written in the background.
        """
        self.spent("save_stall", stall_s)
        self._now.saves += 1
        self._now.save_s += seconds

    def write(self) -> None:
        """Put the record on disk; a disk that refuses ends no run."""
        self._now.elapsed_s = self._tick() - self._began
        self._now.updated = self._wall()
        if self._path is None:
            return
        try:
            write_attempts(self._path, self.attempts)
        except OSError as error:
            if not self._has_complained:
                log.warning(f"{self._path} cannot be written ({error.strerror or error}); training goes on without it")
            self._has_complained = True

    def record(self) -> dict[str, Any]:
        """Write the record and return the keys of a training line (`as_metrics`)."""
        self.write()
        return self.as_metrics()

    def close(self, ended: AttemptEnd) -> None:
        """Write the record of an attempt that is over."""
        self._now.ended = ended
        self.write()

    @property
    def wall_s(self) -> float:
        """Seconds since the run's first start, time between attempts included."""
        elapsed = self._tick() - self._began
        return elapsed + sum(a.elapsed_s for a in self.attempts[:-1]) + sum(a.down_s for a in self.attempts)

    @property
    def fraction(self) -> float:
        """The goodput, 0 to 1: the fraction of wall time in steps that counted."""
        return self.total("step") / max(self.wall_s, 1e-9)

    def total(self, phase: Phase) -> float:
        """Return the seconds of a phase over all attempts."""
        return sum(attempt.in_phase(phase) for attempt in self.attempts)

    @property
    def interruptions(self) -> int:
        """Number of attempts before this one that ended before the run did, on request or not."""
        return sum(attempt.ended != "finished" for attempt in self.attempts[:-1])

    @property
    def failures(self) -> int:
        """Number of interruptions that were not requested; only these lose steps."""
        return sum(attempt.has_failed for attempt in self.attempts[:-1])

    @property
    def mtbf_s(self) -> float | None:
        """Mean seconds between failures: as given, or time up over failures seen; None without either."""
        if self._config.mtbf_hours is not None:
            return 3600 * self._config.mtbf_hours
        return (self.wall_s - sum(a.down_s for a in self.attempts)) / self.failures if self.failures else None

    @property
    def save_cost_s(self) -> float | None:
        """Seconds for which training pauses for one save, by the newest attempt that saved; None before any did."""
        saved = self._last_that_saved()
        return saved.in_phase("save_stall") / saved.saves if saved is not None else None

    @property
    def restart_s(self) -> float:
        """Mean seconds from a failure's last line to the first step after it; 0 before any failure."""
        pairs = zip(self.attempts, self.attempts[1:], strict=False)
        lost = [after.down_s + after.in_phase("setup") for before, after in pairs if before.has_failed]
        return sum(lost) / len(lost) if lost else 0.0

    @property
    def step_s(self) -> float | None:
        """Mean seconds of a step of this attempt, its batch included; None before the first."""
        spent = sum(self._now.in_phase(phase) for phase in ("step", "lost", "wait_for_data"))
        return spent / self._now.steps if self._now.steps and spent > 0 else None

    def suggestion(self) -> Suggestion | None:
        """Return the save interval of Young and Daly; None until a save, a step and a failure rate are known."""
        cost, mtbf, step = self.save_cost_s, self.mtbf_s, self.step_s
        saved = self._last_that_saved()
        if cost is None or mtbf is None or step is None or saved is None:
            return None
        # Training would wait for a save that is still being written when the next is due.
        seconds = max(best_interval(cost, mtbf), saved.save_s / saved.saves)
        steps = max(1, round(seconds / step))
        loss, now = (
            expected_loss(every * step, cost, mtbf, restart_s=self.restart_s) for every in (steps, self._save_every)
        )
        return Suggestion(seconds, steps, loss, now)

    def describe(self) -> str:
        """Return one line for the log."""
        count = len(self.attempts)
        text = f"goodput {_percent(self.fraction)} over {count} attempt{'s' if count > 1 else ''}"
        cost, mtbf, found = self.save_cost_s, self.mtbf_s, self.suggestion()
        if cost is None:
            return f"{text}; no save measured yet"
        if mtbf is None:
            return f"{text}; a save costs {cost:.1f} s; set goodput.mtbf_hours to have a save interval suggested"
        if found is None:
            return f"{text}; a save costs {cost:.1f} s; no step measured yet"
        source = "given" if self._config.mtbf_hours is not None else f"seen: {self.failures} failure(s)"
        return (
            f"{text}; save every {found.steps} steps ({found.seconds:.0f} s) suggested by Young/Daly from a save cost "
            f"of {cost:.1f} s and MTBF {mtbf / 3600:.1f} h ({source}); now {self._save_every}, which loses "
            f"{_percent(found.loss_now)} instead of {_percent(found.loss)}"
        )

    def as_metrics(self) -> dict[str, Any]:
        """Return keys of a training line: the goodput, and seconds of the whole run by phase."""
        found = self.suggestion()
        return {
            "goodput": self.fraction,
            "attempts": len(self.attempts),
            **{f"{phase}_s": self.total(phase) for phase in PHASES if phase != "step"},
            "down_s": sum(attempt.down_s for attempt in self.attempts),
            "suggested_save_steps": found.steps if found is not None else None,
        }

    def _last_that_saved(self) -> Attempt | None:
        return next((attempt for attempt in reversed(self.attempts) if attempt.saves), None)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
