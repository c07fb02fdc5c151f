"""How much of a run's wall time went into steps that counted, over all its attempts, and what the rest went into.

An attempt is one process life of the run. Each leaves a record in `RUN/goodput.json`, written again at every call of
`write`, so that one that is killed has told nearly all. A step counts once: those that a restart repeats, because the
checkpoint it went on from was older than the last step, are `lost`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.train.attempts import PHASES, Attempt, Ending, Phase, read_attempts, write_attempts
from megadiff.train.config import GoodputConfig
from megadiff.train.save_interval import best_interval, expected_loss

log = logging.getLogger("megadiff")


@dataclass(frozen=True)
class Suggestion:
    """The save interval that loses least."""

    seconds: float
    """Of training between two saves."""
    steps: int
    """The same at the measured time of a step, at least 1."""
    loss: float
    """Share of wall time lost to saves, repeated steps and restarts if it is taken."""
    loss_now: float
    """The same with the interval the run has."""


class Goodput:
    """Adds up where the time of this attempt goes; knows the attempts before it.

    Args:
        path: `RUN/goodput.json`; None on ranks other than the main one, where nothing is read or written.
        config: the section `goodput`.
        save_every: steps between checkpoints, as configured.
        before_s: seconds of this attempt that have passed already, in imports and the like; they count as setting up.
        wall, tick: clocks in seconds; `wall` may be set by somebody, `tick` never goes back.
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
        """Count so many seconds; for times measured elsewhere."""
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
            stall_s: the part of it that training stood still for; all of it unless it is written in the background.
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
        """`write`, then `as_metrics`: what a line of metrics asks for."""
        self.write()
        return self.as_metrics()

    def close(self, ended: Ending) -> None:
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
        """The goodput, 0 to 1: the share of wall time in steps that counted."""
        return self.total("step") / max(self.wall_s, 1e-9)

    def total(self, phase: Phase) -> float:
        """Seconds of a phase over all attempts."""
        return sum(attempt.in_phase(phase) for attempt in self.attempts)

    @property
    def interruptions(self) -> int:
        """Attempts before this one that ended before the run did, asked to or not."""
        return sum(attempt.ended != "finished" for attempt in self.attempts[:-1])

    @property
    def failures(self) -> int:
        """Interruptions that nobody asked for; only these lose steps."""
        return sum(attempt.has_failed for attempt in self.attempts[:-1])

    @property
    def mtbf_s(self) -> float | None:
        """Mean seconds between failures: as given, or time up over failures seen; None without either."""
        if self._config.mtbf_hours is not None:
            return 3600 * self._config.mtbf_hours
        return (self.wall_s - sum(a.down_s for a in self.attempts)) / self.failures if self.failures else None

    @property
    def save_cost_s(self) -> float | None:
        """Seconds that training stands still for one save, by the newest attempt that saved; None before any did."""
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
        """The save interval of Young and Daly; None until a save, a step and a failure rate are known."""
        cost, mtbf, step = self.save_cost_s, self.mtbf_s, self.step_s
        saved = self._last_that_saved()
        if cost is None or mtbf is None or step is None or saved is None:
            return None
        # A save that is still being written when the next is due would hold training up.
        seconds = max(best_interval(cost, mtbf), saved.save_s / saved.saves)
        steps = max(1, round(seconds / step))
        loss, now = (
            expected_loss(every * step, cost, mtbf, restart_s=self.restart_s) for every in (steps, self._save_every)
        )
        return Suggestion(seconds, steps, loss, now)

    def describe(self) -> str:
        """One line for the log."""
        count = len(self.attempts)
        said = f"goodput {_percent(self.fraction)} over {count} attempt{'s' if count > 1 else ''}"
        cost, mtbf, found = self.save_cost_s, self.mtbf_s, self.suggestion()
        if cost is None:
            return f"{said}; no save measured yet"
        if mtbf is None:
            return f"{said}; a save costs {cost:.1f} s; set goodput.mtbf_hours to have a save interval suggested"
        if found is None:
            return f"{said}; a save costs {cost:.1f} s; no step measured yet"
        source = "given" if self._config.mtbf_hours is not None else f"seen: {self.failures} failure(s)"
        return (
            f"{said}; save every {found.steps} steps ({found.seconds:.0f} s) suggested by Young/Daly from a save cost "
            f"of {cost:.1f} s and MTBF {mtbf / 3600:.1f} h ({source}); now {self._save_every}, which loses "
            f"{_percent(found.loss_now)} instead of {_percent(found.loss)}"
        )

    def as_metrics(self) -> dict[str, Any]:
        """Keys of a training line: the goodput, and seconds of the whole run by where else they went."""
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
