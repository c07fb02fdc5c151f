"""`RUN/goodput.json`: a record of every attempt, that is, of every process life of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from megadiff.files import write_atomically
from megadiff.untrusted_files import read_bytes

log = logging.getLogger("megadiff")

Phase = Literal["setup", "step", "wait_for_data", "evaluate", "save_stall", "lost"]
Ending = Literal["finished", "stopped", "failed"]
PHASES: tuple[Phase, ...] = ("setup", "step", "wait_for_data", "evaluate", "save_stall", "lost")
_MAX_BYTES = 2**24
_Seconds = Annotated[float, Field(ge=0, le=1e12)]
_Count = Annotated[int, Field(ge=0, le=10**15)]


class Attempt(BaseModel):
    """What one process life of the run left behind; seconds throughout."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    started: float
    """Wall clock, seconds since 1970."""
    updated: float
    """Wall clock of the last line."""
    elapsed_s: _Seconds = 0.0
    """From the start to the last line, on a clock that nobody sets."""
    down_s: _Seconds = 0.0
    """Between the last line of the attempt before and this start; 0 after one that finished."""
    last_step: _Count = 0
    """The last step taken; 0 for none."""
    steps: _Count = 0
    """Steps taken, repeated ones too."""
    phases: dict[str, _Seconds] = Field(default_factory=dict)
    """Seconds by phase."""
    saves: _Count = 0
    """Checkpoints completed."""
    save_s: _Seconds = 0.0
    """From their beginning to their completion, summed; `save_stall` is the part that training stood still for."""
    ended: Ending | None = None
    """None while it runs, and for ever when it was killed."""

    @property
    def has_failed(self) -> bool:
        """Whether an attempt that is over ended against its will."""
        return self.ended in (None, "failed")

    def in_phase(self, phase: Phase) -> float:
        """Seconds of a phase."""
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
    """The records of a `goodput.json`, oldest first; none where it is missing.

    One that is torn or damaged is set aside as `goodput.json.bad`, with a warning: it holds nothing a run depends on.
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
