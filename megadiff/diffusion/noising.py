"""Clean rows to noised rows: the noise contract.

A row's noise is a pure function of (seed, global sample index, position): no generator has a state, so the same row
gets the same bits on any layout, after any resume and on any machine. Two things make the bits the same everywhere:
integer arithmetic (Philox, see `philox`) and probabilities worked out from IEEE-exact operations alone (see `exact`).

Streams, each keyed by (seed, prefix/name) and counted by (row, position), a block of four 32-bit words each:

    prefix/row       position 0..5: level pattern, prompt coin and fraction, infilling coin and fraction, empty fraction
    prefix/empty     word 0: ordering key of the position
    prefix/infill    word 0: whether the position is kept
    prefix/log_snr   words 0-1: the position's level (position 0 for a row with one level)
    prefix/batch     words 0-1: offset of the stratification, row = first sample of the global batch
    prefix/noise     word 0: keep coin, word 1: uniform-or-mask coin, words 2-3: replacement token

A coin of probability P is word < rint(P 2^32), so P is met to within 2^-33. `prefix` is `train` for training.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadiff.diffusion import conditioning as conditions
from megadiff.diffusion import exact
from megadiff.diffusion.conditioning import FloatArray, IntArray, Levels
from megadiff.diffusion.config import ConditioningConfig
from megadiff.diffusion.mixing_base import Mixing
from megadiff.diffusion.philox import Stream, Words, below, threshold
from megadiff.diffusion.snr import LINEAR, Rate
from megadiff.errors import ConfigError, DataError

_BLOCK_TOKENS = 32768  # rows are noised this many tokens at a time, so that temporaries stay in the cache
_GOLDEN_RATIO = 0.6180339887498949


class NoisedRows(NamedTuple):
    """Rows ready for the model, torch tensors on the CPU."""

    noised: Tensor
    """[B, L] int64: the model's input z."""
    clean: Tensor
    """[B, L] int64: the targets x, empty tokens inserted."""
    log_snr: Tensor
    """[B, L] float32: lambda; max_log_snr at noise-free positions."""
    is_noisy: Tensor
    """[B, L] bool: positions that carry loss; the rest are prompt or context and equal the clean token."""
    prompt_length: Tensor
    """[B] int64: how many leading tokens are a noise-free prompt."""
    levels: Tensor
    """[B] int8: `conditioning.Levels` of each row."""
    source: Tensor
    """[B, L] int64: original position of each token (see `conditioning.insert_empties`)."""


def noise_rows(
    clean: npt.NDArray[np.integer] | Tensor,
    *,
    seed: int,
    sample_index: npt.ArrayLike | Tensor,
    mixing: Mixing,
    rate: Rate = LINEAR,
    conditioning: ConditioningConfig | None = None,
    stratified: bool = True,
    global_batch: int | None = None,
    batch_origin: int = 0,
    pad_id: int | None = None,
    prefix: str = "train",
) -> NoisedRows:
    """Condition and noise rows, each by its own global sample index alone.

    Args:
        clean: [B, L] integer ids, numpy or torch, none of them the mask.
        seed: the run's seed.
        sample_index: [B] global sample indices, counted over the whole run, from 0.
        mixing: the noise.
        rate: law of the noise levels.
        conditioning: prompts, infilling, empty tokens, level patterns; None for none of them.
        stratified: with `global_batch` G, sample i takes stratum k of G, u = (k + jitter) / G, where k runs over
            0..G-1 as i runs over its global batch; each u is exactly uniform on [0, 1), each batch covers it evenly,
            and so does every run of neighbouring samples (k steps by about 0.618 G), so ranks share the noise alike.
        global_batch: samples of a global batch; None draws levels independently.
        batch_origin: index of the first sample of some global batch; needed after a change of `global_batch`.
        pad_id: id of an empty token; needed where `conditioning.empty` > 0.
        prefix: what the draws are for; evaluation has its own (see `evaluation_noise`).

    Raises:
        ValueError: shapes that do not fit.
        DataError: a clean token that is the mask or lies outside the vocabulary.
        ConfigError: empty tokens without a pad id.
    """
    tokens, rows = _token_rows(clean, sample_index, mixing)
    conditioning = conditioning or ConditioningConfig()
    if conditioning.empty > 0 and pad_id is None:
        raise ConfigError("conditioning.empty inserts pad tokens: the tokenizer needs a pad id, or set it to 0")
    names = ("row", "empty", "infill", "log_snr", "batch", "noise")
    streams = {name: Stream(seed, f"{prefix}/{name}") for name in names}
    quantiles = streams["log_snr"].uniforms(rows, 1)[:, 0]
    if stratified and global_batch is not None:
        quantiles = stratified_quantiles(streams["batch"], rows, quantiles, global_batch, batch_origin)
    length = tokens.shape[1]
    step = max(1, _BLOCK_TOKENS // max(1, length))
    blocks = [slice(start, start + step) for start in range(0, max(1, len(rows)), step)]
    parts = [
        _noise_part(tokens[block], rows[block], quantiles[block], streams, mixing, rate, conditioning, pad_id)
        for block in blocks
    ]
    return NoisedRows(*(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)))


def stratified_quantiles(
    stream: Stream, rows: IntArray, jitter: FloatArray, global_batch: int, origin: int = 0
) -> FloatArray:
    """Shares u = (k + jitter) / G of the schedule that cover [0, 1] once per global batch, [B].

    The stratum is k = (offset + slot * stride) mod G with slot = (i - origin) mod G, a stride near 0.618 G that has no
    factor in common with G, and an offset drawn for the batch, keyed by its first sample.
    """
    if global_batch < 1:
        raise ValueError(f"global_batch must be at least 1, got {global_batch}")
    slot = (rows - origin) % global_batch
    first, which = np.unique(rows - slot, return_inverse=True)
    words = stream.words(first.astype(np.int64), 1)
    offset = below(words[0], words[1], global_batch)[:, 0].astype(np.int64)[which.reshape(-1)]
    stratum = (offset + slot * _stride(global_batch)) % global_batch
    return (stratum + jitter) / global_batch


def evaluation_noise(
    clean: npt.NDArray[np.integer] | Tensor,
    *,
    seed: int,
    row_index: npt.ArrayLike | Tensor,
    level: int,
    num_levels: int,
    mixing: Mixing,
    rate: Rate = LINEAR,
    prefix: str = "eval",
) -> NoisedRows:
    """Fixed noise for held-out rows: level k of K, one lambda a row, nothing conditioned, every token noisy.

    Row j takes u = (k + offset_j) / K with an offset of its own, so that over k = 0..K-1 its K levels are stratified
    and the mean of `elbo` over them is an unbiased estimate of the row's bound (for the rate's density as documented at
    `Rate.density`). Rows are independent, so the standard deviation of the row means over sqrt(R) is a standard error.

    Args:
        clean: [B, L] ids.
        seed: the evaluation's seed; the same one compares models on the same noise.
        row_index: [B] indices of the rows within the held-out set.
        level: k, in [0, num_levels).
        num_levels: K.
        mixing, rate, prefix: as for `noise_rows`.
    """
    if not 0 <= level < num_levels:
        raise ValueError(f"level must lie in [0, {num_levels}), got {level}")
    tokens, rows = _token_rows(clean, row_index, mixing)
    quantiles = evaluation_quantiles(seed, rows, num_levels, prefix=prefix)[:, level]
    log_snr = np.repeat(rate.log_snr(quantiles).astype(np.float32)[:, None], tokens.shape[1], axis=1)
    words = Stream(seed, f"{prefix}/noise").words(rows, tokens.shape[1], draw=level)
    return NoisedRows(
        noised=torch.from_numpy(_corrupt(tokens, log_snr[:, :1], words, mixing)),
        clean=torch.from_numpy(tokens),
        log_snr=torch.from_numpy(log_snr),
        is_noisy=torch.ones(tokens.shape, dtype=torch.bool),
        prompt_length=torch.zeros(len(rows), dtype=torch.int64),
        levels=torch.full((len(rows),), int(Levels.ISOTROPIC), dtype=torch.int8),
        source=torch.arange(tokens.shape[1]).repeat(len(rows), 1),
    )


def evaluation_quantiles(seed: int, rows: IntArray, num_levels: int, *, prefix: str = "eval") -> FloatArray:
    """Shares u = (k + offset_j) / K of the schedule for every row j and level k, [R, K]."""
    offset = Stream(seed, f"{prefix}/log_snr").uniforms(rows, 1)
    return (np.arange(num_levels) + offset) / num_levels


def _noise_part(
    clean: IntArray,
    rows: IntArray,
    quantiles: FloatArray,
    streams: dict[str, Stream],
    mixing: Mixing,
    rate: Rate,
    config: ConditioningConfig,
    pad_id: int | None,
) -> tuple[npt.NDArray[np.generic], ...]:
    """The fields of `NoisedRows` for a few rows, as arrays."""
    length = clean.shape[1]
    draws = conditions.draw_rows(streams["row"], rows, config)
    source = np.broadcast_to(np.arange(length), clean.shape)
    if config.empty > 0 and pad_id is not None:
        counts = conditions.empty_counts(draws.empty_fraction, length, config.empty_law)
        is_empty = conditions.empty_positions(streams["empty"], rows, counts, length)
        clean, source = conditions.insert_empties(clean, is_empty, pad_id)
    is_noisy, prompt = conditions.noisy_positions(draws, length, rows, streams["infill"])
    log_snr = _levels(draws.levels, quantiles, rows, length, streams["log_snr"], rate)
    words = streams["noise"].words(rows, length)
    varies = bool((draws.levels != Levels.ISOTROPIC).any())
    noised = _corrupt(clean, log_snr if varies else log_snr[:, :1], words, mixing)
    noised = np.where(is_noisy, noised, clean)
    log_snr = np.where(is_noisy, log_snr, np.float32(rate.max_log_snr))
    return noised, clean, log_snr, is_noisy, prompt, draws.levels, source


def _levels(
    levels: npt.NDArray[np.int8], quantiles: FloatArray, rows: IntArray, length: int, stream: Stream, rate: Rate
) -> npt.NDArray[np.float32]:
    """Lambda of every token, [B, L] float32."""
    log_snr = np.repeat(rate.log_snr(quantiles).astype(np.float32)[:, None], length, axis=1)
    independent = np.flatnonzero(levels == Levels.INDEPENDENT)
    if len(independent):
        log_snr[independent] = rate.log_snr(stream.uniforms(rows[independent], length))
    log_snr[levels == Levels.LINEAR] = conditions.linear_log_snr(length, rate)
    return log_snr


def _corrupt(clean: IntArray, log_snr: npt.NDArray[np.float32], words: Words, mixing: Mixing) -> IntArray:
    """Draw z ~ q_lambda(. | x): keep x with probability alpha, else a uniform real token or the mask.

    The uniform token is any of the N real ones, x among them; the mask and padding never come up.
    """
    keep = words[0] < threshold(exact.sigmoid(log_snr))
    if mixing.is_masked_limit:
        return np.where(keep, clean, mixing.mask_id)
    token = below(words[2], words[3], mixing.num_real).astype(np.int64)
    token += token >= mixing.mask_id
    if not mixing.is_uniform_limit:
        token = np.where(words[1] < threshold(mixing.uniform_share(log_snr)), token, mixing.mask_id)
    return np.where(keep, clean, token)


def _token_rows(
    clean: npt.NDArray[np.integer] | Tensor, sample_index: npt.ArrayLike | Tensor, mixing: Mixing
) -> tuple[IntArray, IntArray]:
    """Ids as int64 [B, L] and indices as int64 [B], checked."""
    tokens = np.asarray(clean.numpy() if isinstance(clean, Tensor) else clean).astype(np.int64, copy=False)
    index = sample_index.numpy() if isinstance(sample_index, Tensor) else sample_index
    rows = np.asarray(index).astype(np.int64)
    if tokens.ndim != 2 or rows.shape != tokens.shape[:1]:
        raise ValueError(f"clean must be [B, L] and sample_index [B], got {tokens.shape} and {rows.shape}")
    if rows.size and rows.min() < 0:
        raise ValueError(f"sample_index counts from 0, got {rows.min()}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= mixing.vocab_size):
        raise DataError(
            f"token ids run from {tokens.min()} to {tokens.max()}, outside the vocabulary of {mixing.vocab_size}: "
            "the data were made with another tokenizer"
        )
    if (tokens == mixing.mask_id).any():
        raise DataError(f"the data contain the mask token (id {mixing.mask_id}): they were made with another tokenizer")
    return tokens, rows


def _stride(global_batch: int) -> int:
    """The step nearest 0.618 G that is coprime with G; one is never more than a few dozen away."""
    target = global_batch * _GOLDEN_RATIO
    near = range(max(1, int(target) - 64), min(global_batch, int(target) + 64) + 1)
    return min((step for step in near if math.gcd(step, global_batch) == 1), key=lambda step: abs(step - target))
