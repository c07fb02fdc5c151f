"""Machine code for `noising.noise_batch`, made by numba: the bits of the numpy code, without the interpreter's lock.

One call noises a whole microbatch, sequence by sequence; its temporaries are a few arrays of one sequence. Every
number is made by the same IEEE-exact operations in the same order as in `philox`, `exact`, `schedules`, `conditioning`
and `noising` (by default numba contracts no multiplication and addition), so either code may do any part of a run. The
tests hold the two together.

Compiled code is cached on the disk. numba notices a change of this file alone, so no compiled function may depend on a
value or a function of another module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from megadiff.diffusion import conditioning as conditions
from megadiff.diffusion import exact
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.noising import NoiseOfRun
from megadiff.diffusion.philox import Stream
from megadiff.diffusion.processes.gidd_snr import GiddSnr
from megadiff.diffusion.processes.gidd_time import GiddTime, TimeSchedule
from megadiff.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule, UniformSchedule

# Numbers of a `Plan`, float64.
PER_TOKEN, LINEAR, PROMPT, INFILLING, MAX_FRACTION, PAD_INSERTION = range(6)
LOW_SNR, HIGH_SNR, SCHEDULE_0, SCHEDULE_1, SCHEDULE_2, SCHEDULE_3, LAW_0, LAW_1 = range(6, 14)

# Numbers of a `Plan`, int64.
VOCAB_SIZE, MASK_ID, PAD_ID, NOISE_KIND, SCHEDULE, RELEASED_LAW = range(6)

# Keys of a `Plan`, by stream.
ROW, EMPTY, INFILL, LOG_SNR, BATCH, NOISE = range(6)

MASKS, TOKENS, HYBRID_SNR, HYBRID_TIME_1, HYBRID_TIME = range(5)
LINEAR_SCHEDULE, COSINE_SCHEDULE, UNIFORM_SCHEDULE, TIME_SCHEDULE = range(4)

# `conditioning.NoisePattern`.
_ISOTROPIC, _PER_TOKEN, _LINEAR = 0, 1, 2

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _32, _11 = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(11)
_ZERO, _52 = np.uint64(0), np.uint64(52)
_2, _3, _4, _5, _6, _7, _8, _9 = (np.uint64(step) for step in range(2, 10))
_MANTISSA, _HALF_EXPONENT = np.uint64(0x000FFFFFFFFFFFFF), np.uint64(0x3FE0000000000000)
_BUCKET_BITS = np.uint64(64 - 10)
_BUCKETS = 1024

_LN2_HI, _LN2_LO = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG2_E = 1.44269504088896338700e00
_SQRT_HALF = 0.70710678118654752440
_EXP = tuple(1.0 / math.factorial(k) for k in range(14))
_ATANH = tuple(1.0 / (2 * k + 1) for k in range(13))
_ATAN = tuple((-1.0) ** k / (2 * k + 1) for k in range(14))
_SIN = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9))
_COS = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9))
_HALF_PI = 0.5 * math.pi
_NEWTON_STEPS = 12

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_part = numba.njit(**_OPTIONS)
# Only what numba has inlined becomes vector code, and a loop within would keep the loop around it from that.
_inline = numba.njit(inline="always", **_OPTIONS)


@_inline
def _round(first: Any, second: Any, k0: Any, k1: Any) -> Any:
    """Return half a block each after a round, as `philox._half` has it; of a key the lower word alone counts."""
    return ((second >> _32) * _M1) ^ ((first ^ k0) << _32), ((first >> _32) * _M0) ^ ((second ^ k1) << _32)


@_inline
def _block(position: Any, index: Any, key: Any) -> Any:
    """Return words 0-1 and words 2-3 of a block as two 64-bit numbers, the first of two on top."""
    k0, k1 = key, key >> _32
    first, second = _round(position << _32, (index << _32) | (index >> _32), k0, k1)
    first, second = _round(first, second, k0 + _W0, k1 + _W1)
    first, second = _round(first, second, k0 + _2 * _W0, k1 + _2 * _W1)
    first, second = _round(first, second, k0 + _3 * _W0, k1 + _3 * _W1)
    first, second = _round(first, second, k0 + _4 * _W0, k1 + _4 * _W1)
    first, second = _round(first, second, k0 + _5 * _W0, k1 + _5 * _W1)
    first, second = _round(first, second, k0 + _6 * _W0, k1 + _6 * _W1)
    first, second = _round(first, second, k0 + _7 * _W0, k1 + _7 * _W1)
    first, second = _round(first, second, k0 + _8 * _W0, k1 + _8 * _W1)
    return _round(first, second, k0 + _9 * _W0, k1 + _9 * _W1)


@_part
def _uniform(position: Any, index: Any, key: Any) -> Any:
    first, _ = _block(position, index, key)
    return np.float64(first >> _11) * 2.0**-53


@_inline
def _below(bits: Any, bound: Any) -> Any:
    return ((bits >> _32) * bound + (((bits & _LOW) * bound) >> _32)) >> _32


@_part
def _threshold(probability: Any) -> Any:
    return np.uint64(np.rint(probability * 2.0**32))


@_part
def _horner(coefficients: Any, x: Any) -> Any:
    total = coefficients[len(coefficients) - 1]
    for k in range(len(coefficients) - 2, -1, -1):
        total = total * x + coefficients[k]
    return total


@_part
def _exp(x: Any) -> Any:
    held = min(max(x, -700.0), 700.0)
    k = np.rint(held * _LOG2_E)
    r = (held - k * _LN2_HI) - k * _LN2_LO
    # 2^k as the bits of a float: a normal number for |k| <= 1010, so the product is exact.
    power = np.uint64((np.int64(k) + 1023) << np.int64(52)).view(np.float64)
    return _horner(_EXP, r) * power


@_part
def _log(x: Any) -> Any:
    bits = np.float64(x).view(np.uint64)  # of a normal number: no argument here is below 2^-1022
    half = np.uint64((bits & _MANTISSA) | _HALF_EXPONENT).view(np.float64)
    is_low = half < _SQRT_HALF
    mantissa = half * 2.0 if is_low else half
    k = np.float64(np.int64(bits >> _52) - 1022 - is_low)
    f = (mantissa - 1.0) / (mantissa + 1.0)
    return k * _LN2_HI + (k * _LN2_LO + 2.0 * f * _horner(_ATANH, f * f))


@_part
def _sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + _exp(-x))


@_part
def _atan(y: Any) -> Any:
    for _ in range(3):
        y = y / (1.0 + math.sqrt(1.0 + y * y))
    return 8.0 * (y * _horner(_ATAN, y * y))


@_part
def _log_tan_half_pi(t: Any) -> Any:
    upper = t > 0.5
    angle = ((1.0 - t) if upper else t) * _HALF_PI
    square = angle * angle
    value = _log(angle * _horner(_SIN, square)) - _log(_horner(_COS, square))
    return -value if upper else value


@_part
def _clip(x: Any, floats: Any) -> Any:
    return min(max(x, floats[LOW_SNR]), floats[HIGH_SNR])


@_part
def _scheduled(u: Any, schedule: Any, floats: Any) -> Any:
    """Return the log-SNR at the share u of the schedule, as `NoiseSchedule.log_snr` does, in float32."""
    rest = 1.0 - u
    a, b, c, d = floats[SCHEDULE_0], floats[SCHEDULE_1], floats[SCHEDULE_2], floats[SCHEDULE_3]
    if schedule == LINEAR_SCHEDULE:
        return np.float32(_clip(_log((a * rest + b * u) / (c * rest + d * u)), floats))
    if schedule == COSINE_SCHEDULE:
        return np.float32(_clip(-2.0 * _log_tan_half_pi(a * rest + b * u), floats))
    if schedule == UNIFORM_SCHEDULE:
        return np.float32(floats[HIGH_SNR] * rest + floats[LOW_SNR] * u)
    t, left = a * rest + b * u, b * rest + a * u
    noise = _exp(c + d * (_log(t) + _log(left)))
    return np.float32(_clip(_log(left / (t + noise)), floats))


@_part
def _logit_u_at(s: Any, log_b: Any, half: Any) -> Any:
    """Return `GiddTime.logit_u_at`."""
    log_t, log_rest = -_log(1.0 + _exp(-s)), -_log(1.0 + _exp(s))
    return log_b + (half - 1.0) * log_t + half * log_rest


@_part
def _logit_u(log_snr: Any, noise: Any, floats: Any) -> Any:
    """Return `NoiseLaw.logit_u`."""
    a, b = floats[LAW_0], floats[LAW_1]
    if noise == HYBRID_SNR:
        return a * log_snr + b
    half = 0.5 * b
    if noise == HYBRID_TIME_1:
        at_half, square = _exp(a), _exp(-log_snr)
        return _logit_u_at(2.0 * _log(2.0 * square / (at_half + math.sqrt(at_half * at_half + 4.0 * square))), a, half)
    s = -log_snr
    for _ in range(_NEWTON_STEPS):
        odds = _exp(_logit_u_at(s, a, half))
        excess = s + _log(1.0 + odds) + log_snr
        w = (1.0 - b) / (1.0 + _exp(-s)) + half
        s = s - excess * (1.0 + odds) / (1.0 + odds * w)
    return _logit_u_at(s, a, half)


@_part
def _coins(log_snr: Any, noise: Any, floats: Any) -> Any:
    """Return the thresholds of a level's two coins; the second one is 0 where noise takes none."""
    level = np.float64(log_snr)
    keep = _threshold(_sigmoid(level))
    if noise in (MASKS, TOKENS):
        return keep, _ZERO
    return keep, _threshold(_sigmoid(_logit_u(level, noise, floats)))


@_part
def _fraction(r: Any, floats: Any) -> Any:
    """Return a drawn fraction of a sequence (`conditioning.arccos_law`)."""
    return floats[MAX_FRACTION] * (_atan(math.sqrt(r / (1.0 - r))) / _HALF_PI)


@_part
def _level(sequence: Any, slots: Any, keys: Any, floats: Any, ints: Any) -> Any:
    """Return the one level of a sequence; `slots` are global batch (0: not stratified), origin and stride."""
    index = np.uint64(sequence)
    share = _uniform(_ZERO, index, keys[LOG_SNR])
    global_batch, origin, stride = slots
    if global_batch:
        slot = (sequence - origin) % global_batch
        high, _ = _block(_ZERO, np.uint64(sequence - slot), keys[BATCH])
        offset = np.int64(_below(high, np.uint64(global_batch)))
        share = (np.float64((offset + slot * stride) % global_batch) + share) / np.float64(global_batch)
    return _scheduled(share, ints[SCHEDULE], floats)


@_part
def _insert_empties(
    clean: Any, fraction: Any, index: Any, key: Any, ints: Any, keys: Any, filled: Any, source: Any
) -> None:
    """Insert a sequence's empty tokens where `conditioning.empty_positions` has them: the smallest of as many keys."""
    length, last = len(clean), _ZERO
    if ints[RELEASED_LAW]:
        count = min(np.int64(math.ceil(length * fraction / (1.0 - fraction))), length)
    else:
        count = np.int64(math.floor(length * fraction + 0.5))
    if count:
        sizes = np.zeros(_BUCKETS, dtype=np.int64)
        for i in range(length):
            first, _ = _block(np.uint64(i), index, key)
            keys[i] = (first & ~_LOW) | np.uint64(i)
        for i in range(length):
            sizes[keys[i] >> _BUCKET_BITS] += 1
        bucket, before = 0, 0
        while before + sizes[bucket] < count:
            before += sizes[bucket]
            bucket += 1
        near = np.empty(sizes[bucket], dtype=np.uint64)
        found = 0
        for i in range(length):
            if keys[i] >> _BUCKET_BITS == np.uint64(bucket):
                near[found] = keys[i]
                found += 1
        near.sort()
        last = near[count - before - 1]
    place = 0
    for i in range(length):
        is_empty = count > 0 and keys[i] <= last
        source[i] = min(place, length - 1)
        filled[i] = ints[PAD_ID] if is_empty else clean[source[i]]
        place += not is_empty


@_part
def _corrupt(clean: Any, index: Any, key: Any, keep: Any, uniform: Any, noise: Any, ints: Any, noised: Any) -> None:
    """Draw the tokens of a sequence, as `noising._corrupt` does."""
    length, mask = len(clean), ints[MASK_ID]
    if noise == MASKS:
        for i in range(length):
            first, _ = _block(np.uint64(i), index, key)
            noised[i] = clean[i] if first >> _32 < keep[i] else mask
        return
    real = np.uint64(ints[VOCAB_SIZE] - 1)
    for i in range(length):
        first, second = _block(np.uint64(i), index, key)
        token = np.int64(_below(second, real))
        token += token >= mask
        if noise != TOKENS and first & _LOW >= uniform[i]:
            token = mask
        noised[i] = clean[i] if first >> _32 < keep[i] else token


@_part
def _are_ids(tokens: Any, ints: Any) -> Any:
    """Return whether every number is the id of a token other than the mask."""
    top, masks = _ZERO, 0
    for i in range(len(tokens)):
        top = max(top, np.uint64(tokens[i]))
        masks += tokens[i] == ints[MASK_ID]
    return top < np.uint64(ints[VOCAB_SIZE]) and masks == 0


def _noise_sequences(
    clean: Any,
    sequences: Any,
    slots: Any,
    keys: Any,
    floats: Any,
    ints: Any,
    linear: Any,
    noised: Any,
    filled: Any,
    log_snr: Any,
    is_noisy: Any,
    prompt: Any,
    pattern: Any,
    source: Any,
) -> Any:
    """Noise sequences; return whether all their ids and indices are in range (otherwise nothing is to be used).

    Args:
        clean: [B, L] ids.
        sequences: [B] global sample indices.
        slots: global batch (0: levels are not stratified), index of the first sample of one, and the stride.
        keys: Philox keys of the streams, the first word of each in the low half.
        floats, ints: numbers under the names above.
        linear: [L] levels of a linear sequence; empty if none is.
        noised, filled, log_snr, is_noisy, prompt, pattern, source: results, as in `NoisedBatch`; `filled` (clean) and
            `source` are empty if no pads are inserted.
    """
    length, noise = clean.shape[1], ints[NOISE_KIND]
    keep, uniform = np.empty(length, dtype=np.uint64), np.empty(length, dtype=np.uint64)
    for b in range(len(sequences)):
        if sequences[b] < 0 or not _are_ids(clean[b], ints):
            return False
        index, tokens = np.uint64(sequences[b]), clean[b]
        kind = _uniform(_ZERO, index, keys[ROW])
        pattern[b] = _ISOTROPIC
        if kind < floats[PER_TOKEN] + floats[LINEAR]:
            pattern[b] = _LINEAR
        if kind < floats[PER_TOKEN]:
            pattern[b] = _PER_TOKEN
        if filled.size:
            share = floats[PAD_INSERTION] * _uniform(np.uint64(5), index, keys[ROW])
            _insert_empties(tokens, share, index, keys[EMPTY], ints, keep, filled[b], source[b])
            tokens = filled[b]
        levels, free = log_snr[b], is_noisy[b]
        if pattern[b] == _ISOTROPIC:
            level = _level(sequences[b], slots, keys, floats, ints)
            levels[:] = level
            keep[:], uniform[:] = _coins(level, noise, floats)
        else:
            if pattern[b] == _LINEAR:
                levels[:] = linear
            else:
                for i in range(length):
                    levels[i] = _scheduled(_uniform(np.uint64(i), index, keys[LOG_SNR]), ints[SCHEDULE], floats)
            for i in range(length):
                keep[i], uniform[i] = _coins(levels[i], noise, floats)
        _corrupt(tokens, index, keys[NOISE], keep, uniform, noise, ints, noised[b])
        prompt[b] = _keep_some(tokens, index, keys, floats, noised[b], levels, free)
    return True


@_part
def _keep_some(tokens: Any, index: Any, keys: Any, floats: Any, noised: Any, log_snr: Any, is_noisy: Any) -> Any:
    """Take noise back where a sequence is prompt or context; return the prompt's length."""
    length, prompt, infill = len(tokens), 0, _ZERO
    if _uniform(np.uint64(1), index, keys[ROW]) < floats[PROMPT]:
        fraction = _fraction(_uniform(np.uint64(2), index, keys[ROW]), floats)
        prompt = np.int64(math.floor(fraction * (length - 1))) + 1
    if _uniform(np.uint64(3), index, keys[ROW]) < floats[INFILLING]:
        infill = _threshold(_fraction(_uniform(np.uint64(4), index, keys[ROW]), floats))
    for i in range(length):
        is_noisy[i] = i >= prompt
    if infill:
        for i in range(length):
            first, _ = _block(np.uint64(i), index, keys[INFILL])
            is_noisy[i] &= first >> _32 >= infill
    if prompt or infill:
        highest = np.float32(floats[HIGH_SNR])
        for i in range(length):
            if not is_noisy[i]:
                noised[i] = tokens[i]
                log_snr[i] = highest
    return prompt


_SIGNATURE = (
    "boolean(int64[:, ::1], int64[::1], UniTuple(int64, 3), uint64[::1], float64[::1], int64[::1], float32[::1], "
    "int64[:, ::1], int64[:, ::1], float32[:, ::1], boolean[:, ::1], int64[::1], int8[::1], int64[:, ::1])"
)


def compiled(function: Callable[..., Any], signature: str) -> Callable[..., Any]:
    """Return a function as machine code, from numba's cache or compiled now.

    The cache is in `__pycache__` beside the function's file, else in numba's folder of the user's cache folder, or
    where NUMBA_CACHE_DIR says. Where none of them can be written, or what is there cannot be read, the code is compiled
    for this process alone. Ranks that start together write the same file, each by a rename.
    """
    try:
        return numba.njit(signature, cache=True, **_OPTIONS)(function)
    except Exception:
        return numba.njit(signature, **_OPTIONS)(function)


noise_sequences = compiled(_noise_sequences, _SIGNATURE)


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
    if not noise_sequences(tokens, sequences, strata or _NO_STRATA, *numbers, linear, *results):
        return None
    return noised, filled if has_pads else tokens, log_snr, is_noisy, prompt, pattern, source if has_pads else None


class Plan(NamedTuple):
    """Arguments of `noise_sequences` that stay the same throughout a run."""

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
            return MASKS if law.is_masked_limit else TOKENS, 0.0, 0.0
        return HYBRID_SNR, law.scale, law.shift
    if isinstance(law, GiddTime):
        if law.is_masked_limit:
            return MASKS, 0.0, 0.0
        return HYBRID_TIME_1 if law.gamma == 1 else HYBRID_TIME, law.log_b, law.gamma
    raise TypeError(f"the kernel does not know {type(law).__name__}")


def _schedule(schedule: NoiseSchedule) -> tuple[int, float, float, float, float]:
    """Return the kind of schedule and four numbers."""
    if isinstance(schedule, LinearSchedule):
        ends = np.array([schedule.max_log_snr, schedule.min_log_snr])
        return LINEAR_SCHEDULE, *exact.sigmoid(ends), *exact.sigmoid(-ends)
    if isinstance(schedule, CosineSchedule):
        ends = exact.atan(exact.exp([-0.5 * schedule.max_log_snr, -0.5 * schedule.min_log_snr])) / (0.5 * math.pi)
        return COSINE_SCHEDULE, *ends, 0.0, 0.0
    if isinstance(schedule, UniformSchedule):
        return UNIFORM_SCHEDULE, 0.0, 0.0, 0.0, 0.0
    if isinstance(schedule, TimeSchedule):
        law = schedule.law
        return TIME_SCHEDULE, schedule.time_eps, 1.0 - schedule.time_eps, law.log_b, 0.5 * law.gamma
    raise TypeError(f"the kernel does not know {type(schedule).__name__}")
