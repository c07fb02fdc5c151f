"""Estimation of a bound from few noised copies of a text, which are drawn by their number of noised tokens.

With alpha = 1 - t and t uniform, the number m of noised tokens among n is uniform on 0..n, and given m the level's
t has the law Beta(m + 1, n - m + 1). So a copy can be drawn by its count, stratified over 0..n, and the level then be
integrated out: given the noised copy z,

    E[ sum_i elbo_i | z ] = int G(lambda) q_lambda(z | x) dlambda / int p(lambda) q_lambda(z | x) dlambda

with G the sum over the n tokens of w (KL + IS). The model is evaluated once per copy, since it reads z alone, and the
mean over copies is an unbiased estimate of the whole bound, lambda over all the line. For masked noise the quotient is
(n + 1) / m times the cross-entropy of the masked tokens, and copies without any mask contribute 0. (Using the realised
share m / n of noise as the level, as the released code does, gives n / m there: too low by n / (n + 1).)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.objective import gidd_objective
from megadiff.diffusion.philox import Stream, Words, below, threshold, unit_interval
from megadiff.diffusion.schedules import LINEAR
from megadiff.eval.level_integral import integrated_bound

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_LEVELS = 40.0  # bound on |log-SNR| of a drawn level when its share of masks is computed


@dataclass(frozen=True)
class Copies:
    """Noised copies of one text."""

    noised: IntArray
    """Noised ids, [K, n]."""
    log_snr: FloatArray | None
    """Log-SNR, [K], if the level was drawn and is used as it is; None if it is integrated out."""
    factor: float
    """Factor applied to the mean of `copy_bounds` over copies to obtain the estimate."""


def copies_by_count(clean: IntArray, count: int, *, process: NoiseProcess, seed: int, key: int) -> Copies:
    """Draw copies whose number of noised tokens is stratified over 0..n; over 1..n for masked noise.

    Args:
        clean: [n] ids, n >= 1.
        count: K.
        mixing: the noise.
        seed, key: determine the draws; `key` is the text's own number in [0, 2^63).
    """
    length, is_masked = len(clean), process.is_masked_limit
    share = _strata(count, seed, key)
    noised_count = np.floor(share * (length if is_masked else length + 1)).astype(np.int64) + is_masked
    level = np.sort(_draws(seed, "level", key, count, length + 1, unit_interval))
    level = np.take_along_axis(level, noised_count[:, None], axis=1)
    words = _draws(seed, "noise", key, count, length, tuple)
    order = np.argsort((words[0] << np.uint64(32)) | np.arange(length, dtype=np.uint64), axis=1)
    is_noised = np.zeros((count, length), dtype=np.bool_)
    np.put_along_axis(is_noised, order, np.arange(length) < noised_count[:, None], axis=1)
    _spread_evenly(is_noised, noised_count, Stream(seed, "likelihood/set").uniforms(np.array([key]), 2 * count)[0])
    log_snr = np.log1p(-level) - np.log(np.maximum(level, 1e-300))
    noised = np.where(is_noised, _replacements(words, log_snr, process), clean)
    return Copies(noised, None, length / (length + 1) if is_masked else 1.0)


def copies_by_level(clean: IntArray, count: int, *, process: NoiseProcess, seed: int, key: int) -> Copies:
    """Draw copies at levels stratified over the linear schedule on [-9, 9]: the plain estimator (arguments as
    above)."""
    log_snr = LINEAR.log_snr(_strata(count, seed, key))
    words = _draws(seed, "noise", key, count, len(clean), tuple)
    keep = words[0] < threshold(1.0 / (1.0 + np.exp(-log_snr)))[:, None]
    noised = np.where(keep, clean, _replacements(words, log_snr[:, None], process))
    return Copies(noised, log_snr, LINEAR.mass)


def copy_bounds(
    logits: Tensor, clean: Tensor, noised: Tensor, log_snr: float | None, *, process: NoiseProcess
) -> float:
    """Return the bound as each copy estimates it, in nats over all n tokens.

    Args:
        logits: [n, V or more] the model's output for the copy.
        clean, noised: [n] ids.
        log_snr: the drawn level, or None to integrate over all levels.
        mixing: the noise.
    """
    if log_snr is not None:
        level = torch.full(clean.shape, log_snr, dtype=torch.float64, device=clean.device)
        linear = process.with_schedule(LINEAR)
        return float(gidd_objective(logits, clean, noised, level, mixing=linear).elbo.double().sum())
    if process.is_masked_limit:
        return _masked_bound(logits, clean, noised, process)
    return integrated_bound(logits, clean, noised, process=process)


def _masked_bound(logits: Tensor, clean: Tensor, noised: Tensor, process: NoiseProcess) -> float:
    """(n + 1) / m times the cross-entropy of the m masked tokens; 0 without any."""
    masked = noised == process.mask_id
    count = int(masked.sum())
    if count == 0:
        return 0.0
    values = logits[masked][:, : process.vocab_size]
    values = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
    values[:, process.mask_id] = -torch.inf
    entropy = torch.nn.functional.cross_entropy(values, clean[masked], reduction="none")
    return (len(clean) + 1) / count * float(entropy.double().sum())


def _strata(count: int, seed: int, key: int) -> FloatArray:
    """Return one number in each of `count` equal parts of [0, 1), in order."""
    jitter = Stream(seed, "likelihood/count").uniforms(np.array([key], dtype=np.int64), count)[0]
    return (np.arange(count) + jitter) / count


def _spread_evenly(is_noised: BoolArray, noised_count: IntArray, uniforms: FloatArray) -> None:
    """Spread the copies of a size with fewer possible sets than copies, so that each set occurs about equally often.

    Every copy's set stays uniform among those of its size. Copies of one size are put in a random order, so that
    neighbours differ as independent ones would and a standard error from their differences is, if anything, too large.
    """
    length = is_noised.shape[1]
    for size in np.unique(noised_count).tolist():
        copies = np.flatnonzero(noised_count == size)
        if math.comb(length, size) > len(copies):
            continue
        sets = list(itertools.combinations(range(length), size))
        jitter, shuffle = uniforms[copies], np.argsort(uniforms[len(uniforms) // 2 :][copies])
        chosen = np.floor((np.arange(len(copies)) + jitter) / len(copies) * len(sets)).astype(np.int64)[shuffle]
        is_noised[copies] = False
        for copy, which in zip(copies.tolist(), chosen.tolist(), strict=True):
            is_noised[copy, list(sets[which])] = True


def _draws(seed: int, name: str, key: int, count: int, length: int, read: Callable[[Words], Any]) -> Any:
    """Return `read` applied to the four words of each token of each copy, [K, length] each."""
    words = Stream(seed, f"likelihood/{name}").words(np.array([key], dtype=np.int64), count * length)
    return read(tuple(word.reshape(count, length) for word in words))


def _replacements(words: Words, log_snr: FloatArray, process: NoiseProcess) -> IntArray:
    """Draw each token's replacement if it is noised at its copy's level ([K, 1]), [K, n]."""
    token = below(words[2], words[3], process.num_real).astype(np.int64)
    token += token >= process.mask_id
    share = process.exact_uniform_prob(np.clip(log_snr, -_LEVELS, _LEVELS))
    return np.where(words[1] < threshold(share), token, process.mask_id)
