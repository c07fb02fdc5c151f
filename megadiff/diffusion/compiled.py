"""Choice of the code that noises training sequences: numpy, or machine code by numba (`noise_kernel`).

Both give the same bits. Machine code is taken where numba is installed and the noise is the package's own, as soon as
the process has noised enough tokens to earn back the time of loading it, so a short run never loads numba. numba's own
switch, `NUMBA_DISABLE_JIT=1`, leaves everything to numpy.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megadiff.diffusion.config import ConditioningConfig
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.processes.gidd_snr import GiddSnr
from megadiff.diffusion.processes.gidd_time import GiddTime, TimeSchedule
from megadiff.diffusion.schedules import CosineSchedule, LinearSchedule, UniformSchedule

WORTH_TOKENS = 2**22
"""Number of tokens that a process noises by numpy first. That takes about as long as loading numba."""

_LAWS = frozenset((GiddSnr, GiddTime))
_SCHEDULES = frozenset((LinearSchedule, CosineSchedule, UniformSchedule))


class NoiseOfRun(NamedTuple):
    """Settings of the noise that stay the same throughout a run."""

    seed: int
    prefix: str
    """Prefix of the names of the random streams."""
    process: NoiseProcess
    conditioning: ConditioningConfig
    pad_id: int | None


@dataclass
class Kernel:
    """Machine code of this process, loaded when enough tokens have been noised."""

    tokens: int = 0
    module: Any = None
    """`noise_kernel`, or None as long as numpy noises."""
    is_settled: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def for_tokens(self, tokens: int, process: NoiseProcess) -> Any:
        """Count tokens that are to be noised; return `noise_kernel`, or None if numpy is to noise them."""
        if not _is_known(process):
            return None
        if not self.is_settled:
            self.tokens += tokens
            if self.tokens >= WORTH_TOKENS:
                with self._lock:
                    if not self.is_settled:
                        self.module, self.is_settled = load(), True
        return self.module


kernel = Kernel()


def _is_known(process: NoiseProcess) -> bool:
    """Return whether the kernel computes this noise; classes derived from those it knows may compute otherwise."""
    schedule = process.schedule
    if type(schedule) is TimeSchedule:
        return type(process.law) in _LAWS and type(schedule.law) is GiddTime
    return type(process.law) in _LAWS and type(schedule) in _SCHEDULES


def load() -> Any:
    """Return `noise_kernel`, compiled; None without numba, and with a warning where numba fails."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        import numba

        if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
            return None
        from megadiff.diffusion import noise_kernel
    except Exception as error:  # anything that numba, LLVM or the linker raise: numpy does the same work
        warnings.warn(f"training sequences are noised by numpy, since numba fails: {error}", stacklevel=2)
        return None
    return noise_kernel
