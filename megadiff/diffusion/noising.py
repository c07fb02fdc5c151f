"""Clean sequences to noised sequences: the noise contract.

A sequence's noise is a pure function of (seed, global sample index, position): no generator has a state, so the same
sequence gets the same bits on any layout, after any resume and on any machine. Two things make the bits the same
everywhere: integer arithmetic (Philox, see `philox`) and probabilities worked out from IEEE-exact operations alone (see
`exact`).

Streams, each keyed by (seed, prefix/name) and counted by (sequence, position), a block of four 32-bit words each:

    prefix/row       position 0..5: level pattern, prompt coin and fraction, infilling coin and fraction,
                     empty fraction
    prefix/empty     word 0: ordering key of the position
    prefix/infill    word 0: whether the position is kept
    prefix/log_snr   words 0-1: the position's level (position 0 for a sequence with one level)
    prefix/batch     words 0-1: offset of the stratification, counted by the first sample of the global batch
    prefix/noise     word 0: keep coin, word 1: uniform-or-mask coin, words 2-3: replacement token

The streams' names are part of the contract: another name gives other bits.

A coin of probability P is word < rint(P 2^32), so P is met to within 2^-33. `prefix` is `train` for training.

Training sequences are noised by numpy, here, or by numba's machine code (`noise_kernel`), with the same bits. Machine
code is taken where numba is installed and the noise is the package's own, as soon as the process has noised enough
tokens to earn back the time of loading it, so a short run never loads numba. numba's own switch,
`NUMBA_DISABLE_JIT=1`, leaves everything to numpy.
"""

from __future__ import annotations

import importlib.util
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadiff.diffusion import conditioning as conditions
from megadiff.diffusion import exact
from megadiff.diffusion.conditioning import BoolArray, FloatArray, IntArray, NoisePattern, SequenceDraws
from megadiff.diffusion.config import ConditioningConfig
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.philox import Stream, UintArray, below, philox4x32, threshold
from megadiff.diffusion.processes.gidd_snr import GiddSnr
from megadiff.diffusion.processes.gidd_time import GiddTime, TimeSchedule
from megadiff.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule, UniformSchedule
from megadiff.diffusion.shapes import Bool, Float, Int, Integer
from megadiff.errors import ConfigError, DataError

# Sequences are noised this many tokens at a time: a few temporaries of 64 KiB stay in the cache, and in the memory that
# the allocator keeps (it gives arrays of 128 KiB and more back, and getting fresh pages costs more than the
# arithmetic).
_BLOCK_TOKENS = 8192
_GOLDEN_RATIO = 0.6180339887498949
KERNEL_WORTH_TOKENS = 2**22
"""Number of tokens that a process noises by numpy first. That takes about as long as loading numba."""

_LAWS = frozenset((GiddSnr, GiddTime))
_SCHEDULES = frozenset((LinearSchedule, CosineSchedule, UniformSchedule))


class NoisedBatch(NamedTuple):
    """Sequences ready for the model, torch tensors on the CPU."""

    noised: Int[Tensor, "B L"]
    """The model's input z."""
    clean: Int[Tensor, "B L"]
    """The targets x, empty tokens inserted; where there are none, the memory of int64 ids is shared."""
    log_snr: Float[Tensor, "B L"]
    """Lambda in float32; max_log_snr at noise-free positions."""
    is_noisy: Bool[Tensor, "B L"]
    """Positions that carry loss; the rest are prompt or context and equal the clean token."""
    prompt_length: Int[Tensor, " B"]
    """Number of leading tokens that are a noise-free prompt."""
    pattern: Int[Tensor, " B"]
    """`conditioning.NoisePattern` of each sequence, in int8."""
    source: Int[Tensor, "B L"]
    """Original position of each token (see `conditioning.insert_empties`); to be read, not written."""
    documents: Int[Tensor, "B L"] | None = None
    """Number of each token's document, which ascends along a sequence; None if every sequence is one document."""

    def columns(self) -> dict[str, Tensor]:
        """Return the tensors by name; `documents` only where there are several."""
        return {name: column for name, column in self._asdict().items() if column is not None}

    def part(self, which: Any) -> NoisedBatch:
        """Return some sequences: of an index without the batch axis, of a slice or of indices with it."""
        return NoisedBatch(**{name: column[which] for name, column in self.columns().items()})


def joined_batches(batches: Sequence[NoisedBatch]) -> NoisedBatch:
    """Return the sequences of several batches as one."""
    columns = list(zip(*(batch[:-1] for batch in batches), strict=True))
    documents = None
    if any(batch.documents is not None for batch in batches):
        found = (torch.zeros_like(one.source) if one.documents is None else one.documents for one in batches)
        documents = torch.cat([*found])
    return NoisedBatch(*map(torch.cat, columns), documents=documents)


def noise_batch(
    clean: Integer[npt.NDArray[np.integer] | Tensor, " ..."],
    *,
    seed: int,
    sample_index: npt.ArrayLike | Tensor,
    process: NoiseProcess,
    conditioning: ConditioningConfig | None = None,
    stratified: bool = True,
    global_batch: int | None = None,
    batch_origin: int = 0,
    pad_id: int | None = None,
    prefix: str = "train",
) -> NoisedBatch:
    """Condition and noise sequences, each by its own global sample index alone.

    Args:
        clean: [B, L] integer ids, numpy or torch, none of them the mask.
        seed: the run's seed.
        sample_index: [B] global sample indices, counted over the whole run, from 0.
        process: the noise; its schedule is the distribution of the noise levels.
        conditioning: prompts, infilling, empty tokens, level patterns; None for none of them.
        stratified: with `global_batch` G, sample i takes stratum k of G, u = (k + jitter) / G, where k runs over
            0..G-1 as i runs over its global batch; each u is exactly uniform on [0, 1), each batch covers it evenly,
            and so does every run of neighbouring samples (k steps by about 0.618 G), so ranks share the noise alike.
        global_batch: samples of a global batch; None draws levels independently.
        batch_origin: index of the first sample of some global batch; needed after a change of `global_batch`.
        pad_id: id of an empty token; needed where `conditioning.pad_insertion` > 0.
        prefix: what the draws are for; evaluation has its own (see `evaluation_noise`).

    Raises:
        ValueError: shapes that do not fit.
        DataError: a clean token that is the mask or lies outside the vocabulary.
        ConfigError: empty tokens without a pad id.
    """
    conditioning = conditioning or ConditioningConfig()
    if stratified and global_batch is not None:
        strata = global_batch, batch_origin, _stride(global_batch) if global_batch > 0 else 0
    else:
        strata = None
    batch = _noise_compiled(clean, sample_index, NoiseOfRun(seed, prefix, process, conditioning, pad_id), strata)
    if batch is not None:
        return batch
    tokens, sequences = _token_sequences(clean, sample_index, process)
    if conditioning.pad_insertion > 0 and pad_id is None:
        raise ConfigError("conditioning.pad_insertion inserts pad tokens: the tokenizer needs a pad id, or set it to 0")
    streams = _streams(seed, prefix)
    quantiles = streams["log_snr"].uniforms(sequences, 1)[:, 0]
    if stratified and global_batch is not None:
        quantiles = stratified_quantiles(streams["batch"], sequences, quantiles, global_batch, batch_origin)
    draws = conditions.draw_sequences(streams["row"], sequences, conditioning)
    level = _level(process.schedule.log_snr(quantiles).astype(np.float32)[:, None], process)
    length = tokens.shape[1]
    source = _positions(length).expand(tokens.shape)
    if conditioning.pad_insertion > 0 and pad_id is not None:
        counts = conditions.empty_counts(draws.empty_fraction, length, conditioning.pad_insertion_law)
        tokens, moved = _insert_empties(tokens, sequences, counts, streams["empty"], pad_id)
        source = torch.from_numpy(moved)
    noised, log_snr = np.empty_like(tokens), np.empty(tokens.shape, dtype=np.float32)
    is_noisy, prompt = np.empty(tokens.shape, dtype=np.bool_), np.empty(len(sequences), dtype=np.int64)
    for which in _blocks(draws.pattern != NoisePattern.ISOTROPIC, length):
        part = _noise_part(tokens[which], sequences[which], draws.of(which), level.of(which), streams, process)
        noised[which], log_snr[which], is_noisy[which], prompt[which] = part
    arrays = noised, tokens, log_snr, is_noisy, prompt, draws.pattern
    return NoisedBatch(*(torch.from_numpy(array) for array in arrays), source=source)


class NoiseOfRun(NamedTuple):
    """Settings of the noise that stay the same throughout a run."""

    seed: int
    prefix: str
    """Prefix of the names of the random streams."""
    process: NoiseProcess
    conditioning: ConditioningConfig
    pad_id: int | None


def _noise_compiled(
    clean: npt.NDArray[np.integer] | Tensor,
    sample_index: npt.ArrayLike | Tensor,
    run: NoiseOfRun,
    strata: tuple[int, int, int] | None,
) -> NoisedBatch | None:
    """Return what the rest of `noise_batch` returns, by machine code.

    None where that is not loaded or does not know the noise, and for wrong input, which numpy's code refuses.
    """
    machine_code = kernel.for_tokens(math.prod(clean.shape), run.process)
    if machine_code is None:
        return None
    tokens = _int64(clean)
    index = np.asarray(sample_index.numpy() if isinstance(sample_index, Tensor) else sample_index)
    found = machine_code.noise(tokens, index.astype(np.int64), run, strata)
    if found is None:
        return None
    *arrays, source = found
    place = _positions(tokens.shape[1]).expand(tokens.shape) if source is None else torch.from_numpy(source)
    return NoisedBatch(*map(torch.from_numpy, arrays), source=place)


def with_given(batch: NoisedBatch, predicted: Bool[npt.NDArray[np.bool_], "B L"], process: NoiseProcess) -> NoisedBatch:
    """Return a batch in which the tokens that are not to be predicted are noise-free.

    All other bits stay as they are. A pad that was inserted before a token is what that token is.

    Args:
        batch: the noised sequences.
        predicted: whether each token of the sequences, before pads were inserted, is to be predicted.
        process: the noise.
    """
    is_noisy = batch.is_noisy & torch.from_numpy(predicted).gather(1, batch.source)
    return batch._replace(
        noised=torch.where(is_noisy, batch.noised, batch.clean),
        log_snr=batch.log_snr.masked_fill(~is_noisy, process.schedule.max_log_snr),
        is_noisy=is_noisy,
    )


def with_documents(batch: NoisedBatch, documents: Int[npt.NDArray[np.int64], "B L"]) -> NoisedBatch:
    """Return a batch whose sequences consist of documents; a pad that was inserted before a token is in its document.

    Args:
        batch: the noised sequences.
        documents: number of the document of each token of the sequences, before pads were inserted.
    """
    return batch._replace(documents=torch.from_numpy(documents).gather(1, batch.source))


def stratified_quantiles(
    stream: Stream,
    sequences: Int[IntArray, " B"],
    jitter: Float[FloatArray, " B"],
    global_batch: int,
    origin: int = 0,
) -> Float[FloatArray, " B"]:
    """Shares u = (k + jitter) / G of the schedule that cover [0, 1] once per global batch.

    The stratum is k = (offset + slot * stride) mod G with slot = (i - origin) mod G, a stride near 0.618 G that has no
    factor in common with G, and an offset drawn for the batch, keyed by its first sample.
    """
    if global_batch < 1:
        raise ValueError(f"global_batch must be at least 1, got {global_batch}")
    slot = (sequences - origin) % global_batch
    offset = [_batch_offset(stream.key, first, global_batch) for first in (sequences - slot).tolist()]
    stratum = (np.array(offset, dtype=np.int64) + slot * _stride(global_batch)) % global_batch
    return (stratum + jitter) / global_batch


def evaluation_noise(
    clean: Integer[npt.NDArray[np.integer] | Tensor, " ..."],
    *,
    seed: int,
    sequence_index: npt.ArrayLike | Tensor,
    level: int,
    num_levels: int,
    process: NoiseProcess,
    prefix: str = "eval",
) -> NoisedBatch:
    """Draw the fixed noise of held-out sequences: level k of K, one lambda a sequence, nothing conditioned, every token
    noisy.

    Sequence j takes u = (k + offset_j) / K with an offset of its own, so that over k = 0..K-1 its K levels are
    stratified and the mean of `elbo` over them is an unbiased estimate of the sequence's bound (for the density as
    documented at `NoiseSchedule.density`). Sequences are independent, so the standard deviation of the sequence means
    over sqrt(R) is a standard error.

    Args:
        clean: [B, L] ids.
        seed: the evaluation's seed; the same one compares models on the same noise.
        sequence_index: [B] indices of the sequences within the held-out set.
        level: k, in [0, num_levels).
        num_levels: K.
        process, prefix: as for `noise_batch`.
    """
    if not 0 <= level < num_levels:
        raise ValueError(f"level must lie in [0, {num_levels}), got {level}")
    tokens, sequences = _token_sequences(clean, sequence_index, process)
    quantiles = evaluation_quantiles(seed, sequences, num_levels, prefix=prefix)[:, level]
    log_snr = process.schedule.log_snr(quantiles).astype(np.float32)[:, None]
    sequence_level, stream, noised = _level(log_snr, process), Stream(seed, f"{prefix}/noise"), np.empty_like(tokens)
    for which in _blocks(np.zeros(len(sequences), dtype=np.bool_), tokens.shape[1]):
        noised[which] = _corrupt(tokens[which], sequences[which], sequence_level.of(which), stream, process, draw=level)
    return isotropic_batch(torch.from_numpy(noised), torch.from_numpy(tokens), log_snr=log_snr[:, 0])


def isotropic_batch(
    noised: Int[Tensor, "B L"], clean: Int[Tensor, "B L"], *, log_snr: Float[np.ndarray, " B"]
) -> NoisedBatch:
    """Return sequences of one noise level each, of which every token counts; no prompt, nothing inserted.

    Args:
        noised, clean: ids of the model's input and of its targets, on the CPU.
        log_snr: lambda of each sequence.
    """
    count, length = clean.shape
    levels = torch.from_numpy(np.asarray(log_snr, dtype=np.float32))
    return NoisedBatch(
        noised=noised.to(torch.int64),
        clean=clean.to(torch.int64),
        log_snr=levels[:, None].expand(count, length).contiguous(),
        is_noisy=torch.ones(count, length, dtype=torch.bool),
        prompt_length=torch.zeros(count, dtype=torch.int64),
        pattern=torch.full((count,), int(NoisePattern.ISOTROPIC), dtype=torch.int8),
        source=torch.arange(length).expand(count, length),
    )


def evaluation_quantiles(
    seed: int, sequences: Int[IntArray, " B"], num_levels: int, *, prefix: str = "eval"
) -> Float[FloatArray, "B {num_levels}"]:
    """Shares u = (k + offset_j) / K of the schedule for every sequence j and level k."""
    offset = Stream(seed, f"{prefix}/log_snr").uniforms(sequences, 1)
    return (np.arange(num_levels) + offset) / num_levels


class _KeepThresholds(NamedTuple):
    """Lambda and the thresholds of its two coins, [B, 1] for sequences of one level or [B, L]."""

    log_snr: npt.NDArray[np.float32]
    keep: UintArray
    uniform: UintArray | None
    """None where noise is masks alone or random tokens alone, and takes no coin."""

    def of(self, which: IntArray) -> _KeepThresholds:
        """Select some sequences."""
        return _KeepThresholds(
            self.log_snr[which], self.keep[which], None if self.uniform is None else self.uniform[which]
        )


@lru_cache(typed=True)
def _streams(seed: int, prefix: str) -> dict[str, Stream]:
    """Return the streams of the module's table, cached since a stream hashes its key when it is first used."""
    names = ("row", "empty", "infill", "log_snr", "batch", "noise")
    return {name: Stream(seed, f"{prefix}/{name}") for name in names}


def _blocks(varies: BoolArray, length: int) -> Iterator[IntArray]:
    """Yield the indices of sequences to noise together: first those of one level, then those whose level varies."""
    step = max(1, _BLOCK_TOKENS // max(1, length))
    for group in (np.flatnonzero(~varies), np.flatnonzero(varies)):
        for start in range(0, len(group), step):
            yield group[start : start + step]


def _insert_empties(
    clean: Int[IntArray, "B L"],
    sequences: Int[IntArray, " B"],
    counts: Int[IntArray, " B"],
    stream: Stream,
    pad_id: int,
) -> tuple[Int[IntArray, "B L"], Int[IntArray, "B L"]]:
    """Return sequences with their `counts` empty tokens, and each token's source (see
    `conditioning.insert_empties`)."""
    filled, source = np.empty_like(clean), np.empty_like(clean)
    for which in _blocks(np.zeros(len(sequences), dtype=np.bool_), clean.shape[1]):
        is_empty = conditions.empty_positions(stream, sequences[which], counts[which], clean.shape[1])
        filled[which], source[which] = conditions.insert_empties(clean[which], is_empty, pad_id)
    return filled, source


def _noise_part(
    clean: Int[IntArray, "B L"],
    sequences: Int[IntArray, " B"],
    draws: SequenceDraws,
    level: _KeepThresholds,
    streams: dict[str, Stream],
    process: NoiseProcess,
) -> tuple[
    Int[IntArray, "B L"],
    Float[npt.NDArray[np.float32], " B #L"],
    Bool[BoolArray, "B L"],
    Int[IntArray, " B"],
]:
    """Noise a few sequences of one level each, or of varying ones; return tokens, lambda, is_noisy and prompt
    length."""
    length = clean.shape[1]
    if draws.pattern[0] != NoisePattern.ISOTROPIC:
        level = _level(
            _varying_log_snr(draws.pattern, sequences, length, streams["log_snr"], process.schedule), process
        )
    is_noisy, prompt = conditions.noisy_positions(draws, length, sequences, streams["infill"])
    noised, log_snr = _corrupt(clean, sequences, level, streams["noise"], process), level.log_snr
    if not is_noisy.all():
        noised = np.where(is_noisy, noised, clean)
        log_snr = np.where(is_noisy, log_snr, np.float32(process.schedule.max_log_snr))
    return noised, log_snr, is_noisy, prompt


def _level(log_snr: npt.NDArray[np.float32], process: NoiseProcess) -> _KeepThresholds:
    """Return noise levels with the thresholds of their coins."""
    is_pure = process.is_masked_limit or process.is_uniform_limit
    uniform = None if is_pure else threshold(process.exact_uniform_prob(log_snr))
    return _KeepThresholds(log_snr, threshold(exact.sigmoid(log_snr)), uniform)


def _varying_log_snr(
    pattern: Int[npt.NDArray[np.int8], " B"],
    sequences: Int[IntArray, " B"],
    length: int,
    stream: Stream,
    schedule: NoiseSchedule,
) -> Float[npt.NDArray[np.float32], "B {length}"]:
    """Return lambda of every token of sequences whose level varies."""
    log_snr = np.empty((len(sequences), length), dtype=np.float32)
    is_linear = pattern == NoisePattern.LINEAR
    if is_linear.any():
        log_snr[is_linear] = conditions.linear_log_snr(length, schedule)
    if not is_linear.all():
        log_snr[~is_linear] = schedule.log_snr(stream.uniforms(sequences[~is_linear], length))
    return log_snr


def _corrupt(
    clean: Int[IntArray, "B L"],
    sequences: Int[IntArray, " B"],
    level: _KeepThresholds,
    stream: Stream,
    process: NoiseProcess,
    *,
    draw: int = 0,
) -> Int[IntArray, "B L"]:
    """Draw z ~ q_lambda(. | x): keep x with probability alpha, else a uniform real token or the mask.

    The uniform token is any of the N real ones, x among them; the mask and padding never come up.
    """
    words = stream.words(sequences, clean.shape[1], draw=draw, count=1 if process.is_masked_limit else 4)
    keep = words[0] < level.keep
    if process.is_masked_limit:
        return np.where(keep, clean, process.mask_id)
    token = below(words[2], words[3], process.num_real).view(np.int64)
    token += token >= process.mask_id
    if level.uniform is not None:
        token = np.where(words[1] < level.uniform, token, process.mask_id)
    return np.where(keep, clean, token)


def _token_sequences(
    clean: npt.NDArray[np.integer] | Tensor, sample_index: npt.ArrayLike | Tensor, process: NoiseProcess
) -> tuple[Int[IntArray, "B L"], Int[IntArray, " B"]]:
    """Return ids and indices as int64, checked."""
    tokens = _int64(clean)
    index = sample_index.numpy() if isinstance(sample_index, Tensor) else sample_index
    sequences = np.asarray(index).astype(np.int64)
    if tokens.ndim != 2 or sequences.shape != tokens.shape[:1]:
        raise ValueError(f"clean must be [B, L] and sample_index [B], got {tokens.shape} and {sequences.shape}")
    if sequences.size and sequences.min() < 0:
        raise ValueError(f"sample_index counts from 0, got {sequences.min()}")
    # As an unsigned number, a negative id is a large one: one look finds both.
    if tokens.size and tokens.view(np.uint64).max() >= process.vocab_size:
        raise DataError(
            f"token ids run from {tokens.min()} to {tokens.max()}, outside the vocabulary of {process.vocab_size}: "
            "the data were made with another tokenizer"
        )
    if (tokens == process.mask_id).any():
        raise DataError(
            f"the data contain the mask token (id {process.mask_id}): they were made with another tokenizer"
        )
    return tokens, sequences


def _int64(clean: npt.NDArray[np.integer] | Tensor) -> npt.NDArray[np.int64]:
    """Return ids as a contiguous array of int64 that may be written to: the one given if it is such an array."""
    ids = clean.numpy() if isinstance(clean, Tensor) else clean
    return np.require(ids, dtype=np.int64, requirements=["C", "W"])


@lru_cache
def _positions(length: int) -> Tensor:
    """Return 0, 1, ..., length - 1, for reading."""
    return torch.arange(length)


@lru_cache
def _batch_offset(key: tuple[int, int], first: int, global_batch: int) -> int:
    """Return the offset of the stratification of the global batch that begins with a sample, in [0, global_batch)."""
    high, low, *_ = philox4x32((0, 0, first & 0xFFFFFFFF, (first >> 32) & 0xFFFFFFFF), key)
    return ((high << 32 | low) * global_batch) >> 64


@lru_cache
def _stride(global_batch: int) -> int:
    """Return the step nearest 0.618 G that is coprime with G; one is never more than a few dozen away."""
    target = global_batch * _GOLDEN_RATIO
    near = range(max(1, int(target) - 64), min(global_batch, int(target) + 64) + 1)
    return min((step for step in near if math.gcd(step, global_batch) == 1), key=lambda step: abs(step - target))


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
            if self.tokens >= KERNEL_WORTH_TOKENS:
                with self._lock:
                    if not self.is_settled:
                        self.module, self.is_settled = load_kernel(), True
        return self.module


kernel = Kernel()


def _is_known(process: NoiseProcess) -> bool:
    """Return whether the kernel computes this noise; classes derived from those it knows may compute otherwise."""
    schedule = process.schedule
    if type(schedule) is TimeSchedule:
        return type(process.law) in _LAWS and type(schedule.law) is GiddTime
    return type(process.law) in _LAWS and type(schedule) in _SCHEDULES


def load_kernel() -> Any:
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
