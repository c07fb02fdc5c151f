"""Arguments of `noise_kernel` for a run, and a microbatch noised by it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megadiff.diffusion import conditioning as conditions
from megadiff.diffusion import exact, noise_kernel
from megadiff.diffusion.compiled import NoiseOfRun
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.philox import Stream
from megadiff.diffusion.processes.gidd_snr import GiddSnr
from megadiff.diffusion.processes.gidd_time import GiddTime, TimeSchedule
from megadiff.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule, UniformSchedule

_STREAMS = ("row", "empty", "infill", "log_snr", "batch", "noise")
_NOTHING, _NO_LEVELS = np.empty((0, 0), np.int64), np.empty(0, np.float32)
_NO_STRATA = 0, 0, 0


def noise(
    tokens: npt.NDArray[np.int64],
    sequences: npt.NDArray[np.int64],
    run: NoiseOfRun,
    strata: tuple[int, int, int] | None,
) -> tuple[npt.NDArray[Any] | None, ...] | None:
    """Return the arrays of a `NoisedBatch` in its order, its source None without inserted pads.

    None means input that is to be refused.

    Args:
        tokens: [B, L] ids.
        sequences: [B] global sample indices.
        run: settings of the noise.
        strata: global batch, index of the first sample of one, and stride; None if levels are not stratified.
    """
    conditioning = run.conditioning
    has_pads = conditioning.pad_insertion > 0
    is_wrong = tokens.ndim != 2 or sequences.shape != tokens.shape[:1] or (has_pads and run.pad_id is None)
    if is_wrong or (strata is not None and not 0 < strata[0] < 2**31):
        return None
    shape = tokens.shape
    noised, log_snr, is_noisy = np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.bool_)
    prompt, pattern = np.empty(shape[0], np.int64), np.empty(shape[0], np.int8)
    filled, source = (np.empty(shape, np.int64), np.empty(shape, np.int64)) if has_pads else (_NOTHING, _NOTHING)
    linear = linear_levels(shape[1], run.process.schedule) if conditioning.linear_noise > 0 else _NO_LEVELS
    results = noised, filled, log_snr, is_noisy, prompt, pattern, source
    numbers = plan(run)
    if not noise_kernel.noise_sequences(tokens, sequences, strata or _NO_STRATA, *numbers, linear, *results):
        return None
    return noised, filled if has_pads else tokens, log_snr, is_noisy, prompt, pattern, source if has_pads else None


class Plan(NamedTuple):
    """Arguments of `noise_kernel.noise_sequences` that stay the same throughout a run."""

    keys: npt.NDArray[np.uint64]
    floats: npt.NDArray[np.float64]
    ints: npt.NDArray[np.int64]


@lru_cache(maxsize=16)
def plan(run: NoiseOfRun) -> Plan:
    """Return the kernel's numbers."""
    seed, prefix, process, conditioning, pad_id = run
    law, schedule = _law(process), _schedule(process.schedule)
    keys = [low | high << 32 for low, high in (Stream(seed, f"{prefix}/{name}").key for name in _STREAMS)]
    floats = (
        *(conditioning.per_token_noise, conditioning.linear_noise, conditioning.prompt, conditioning.infilling),
        *(conditioning.max_fraction, conditioning.pad_insertion),
        *(process.schedule.min_log_snr, process.schedule.max_log_snr),
        *(*schedule[1:], *law[1:]),
    )
    is_released = conditioning.pad_insertion_law == "released"
    ints = process.vocab_size, process.mask_id, -1 if pad_id is None else pad_id, law[0], schedule[0], is_released
    return Plan(np.array(keys, dtype=np.uint64), np.array(floats, dtype=np.float64), np.array(ints, dtype=np.int64))


@lru_cache(maxsize=16)
def linear_levels(length: int, schedule: NoiseSchedule) -> npt.NDArray[np.float32]:
    """Return the levels of a linear sequence."""
    return conditions.linear_log_snr(length, schedule).astype(np.float32)


def _law(process: NoiseProcess) -> tuple[int, float, float]:
    """Return the kind of noise and two numbers."""
    law = process.law
    if isinstance(law, GiddSnr):
        if law.is_masked_limit or law.is_uniform_limit:
            return noise_kernel.MASKS if law.is_masked_limit else noise_kernel.TOKENS, 0.0, 0.0
        return noise_kernel.HYBRID_SNR, law.scale, law.shift
    if isinstance(law, GiddTime):
        if law.is_masked_limit:
            return noise_kernel.MASKS, 0.0, 0.0
        return noise_kernel.HYBRID_TIME_1 if law.gamma == 1 else noise_kernel.HYBRID_TIME, law.log_b, law.gamma
    raise TypeError(f"the kernel does not know {type(law).__name__}")


def _schedule(schedule: NoiseSchedule) -> tuple[int, float, float, float, float]:
    """Return the kind of schedule and four numbers."""
    if isinstance(schedule, LinearSchedule):
        ends = np.array([schedule.max_log_snr, schedule.min_log_snr])
        return noise_kernel.LINEAR_SCHEDULE, *exact.sigmoid(ends), *exact.sigmoid(-ends)
    if isinstance(schedule, CosineSchedule):
        ends = exact.atan(exact.exp([-0.5 * schedule.max_log_snr, -0.5 * schedule.min_log_snr])) / (0.5 * math.pi)
        return noise_kernel.COSINE_SCHEDULE, *ends, 0.0, 0.0
    if isinstance(schedule, UniformSchedule):
        return noise_kernel.UNIFORM_SCHEDULE, 0.0, 0.0, 0.0, 0.0
    if isinstance(schedule, TimeSchedule):
        law = schedule.law
        return noise_kernel.TIME_SCHEDULE, schedule.time_eps, 1.0 - schedule.time_eps, law.log_b, 0.5 * law.gamma
    raise TypeError(f"the kernel does not know {type(schedule).__name__}")
