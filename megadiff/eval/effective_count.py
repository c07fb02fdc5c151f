"""Estimation of a bound from few noised copies of a text, which are drawn by their number of noised tokens.

Given a copy z of n tokens, log q_lambda(z | x) depends only on how many tokens are masks, kept and changed. So do the
quadrature nodes and, for each of these three kinds of token, the weight w(lambda) and c = beta u / N. The vocabulary
enters a token's integrand through T = sum over v != x of log(1 + rho p_v) alone, linearly: KL = (alpha + c) delta - c T
(see `diffusion.objective`). Exchanging sum and integral,

    sum over nodes s of a_s c_s w_s T_s = sum over v of F(log p_v)
    F(l) = sum over nodes s of a_s c_s w_s log(1 + rho_s e^l)

F is one smooth function for each kind of token. It is tabulated once for each triple of counts and then read at every
vocabulary entry, so that a copy costs about one pass over its logits, however many nodes the integral takes. Each term
of the table is one more read: long series at few points, which are cheap to make, are turned into short ones at many.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.objective import LOG_RHO_LIMIT, VocabularySums, gidd_objective, terms_from_sums
from megadiff.diffusion.philox import Stream, Words, below, threshold, unit_interval
from megadiff.diffusion.schedules import LINEAR

LOWEST, HIGHEST = -40.0, 100.0
"""Range of log-SNR outside which the integrand is ignored. Below, it falls as e^(2 lambda) or, at masks, as e^lambda;
above, as e^-lambda from lambda = -log(N p_x) on, which may be large for a token with -log p_x = 60 nats.
"""

_NEGLIGIBLE = -40.0  # log of the share of its peak below which an integrand is ignored
_COARSE = torch.linspace(LOWEST, HIGHEST, 2801, dtype=torch.float64)
_FINE = 1001  # points of the refined search for the integrand's support
_PANEL = 4.0  # longest stretch of log-SNR for one Gauss-Legendre rule; the integrand's nearest pole is pi away
_RULE = tuple(torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(20))

_KINDS = ("mask", "kept", "changed")
_SPACING = 0.125  # grid spacing of the integrals' table, in log p
_ORDER = 6  # terms of its Taylor series around a point: the rest is below (0.0625 / pi)^6 = 6e-11
_FINENESS = 8  # points of the table that is read for each of the integrals'
_FINE_SPACING = _SPACING / _FINENESS
_FINE_ORDER = 4  # terms of its series: the rest is below (0.0078 / pi)^4 = 4e-11
_LINEAR = 18.0  # below log p = -log rho - this, log(1 + rho p) is rho p
_CHUNK = 2**17  # vocabulary entries read together on the CPU, to fit its cache; 2**6 times more on a GPU

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_MAX_LOG_SNR = 40.0  # of a drawn level, in absolute value, when its share of masks is computed


@dataclass(frozen=True)
class _Levels:
    """Quadrature for the copies with one triple of counts; everything in float64 on the CPU."""

    nodes: Tensor
    """Log-SNR of the nodes, [S]."""
    weights: Tensor
    """Quadrature weights times q(z | x), divided by the integral of p(lambda) q(z | x): [S]."""
    table: Tensor
    """Taylor coefficients of F around log p = -_FINE_SPACING g, in units of _FINE_SPACING, for each of _KINDS:
    [_FINE_ORDER, 3, G]."""


def integrated_bound(logits: Tensor, clean: Tensor, noised: Tensor, *, process: NoiseProcess) -> float:
    """Return the expected sum over tokens of the ELBO integrand given this copy, in nats over all n tokens.

    Args:
        logits: [n, V or more] the model's prediction for the copy; computed in float64.
        clean, noised: [n] ids; `clean` holds no mask.
        process: the noise, of any kind but purely masked, for which the integral is known in closed form.
    """
    masks, kept = int((noised == process.mask_id).sum()), int((noised == clean).sum())
    levels = _levels((masks, kept, len(clean) - masks - kept), process)
    kind = torch.where(noised == process.mask_id, 0, torch.where(noised == clean, 1, 2))
    nodes, weights, table = (part.to(clean.device) for part in (levels.nodes, levels.weights, levels.table))
    total = torch.zeros((), dtype=torch.float64, device=clean.device)
    log_odds, log_p_noised = total.new_empty(len(clean)), total.new_empty(len(clean))
    size = (2**6 if clean.is_cuda else 1) * _CHUNK
    for part in _parts(len(clean), size // process.vocab_size):
        others, log_total, log_odds[part], log_p_noised[part] = _sums(logits[part], clean[part], noised[part], process)
        # The clean token and the mask have no part in the sum: they are read at the table's end, and taken off below.
        end = log_total - _FINE_SPACING * (table.shape[-1] - 1)
        others.scatter_(-1, clean[part, None], end)
        others[:, process.mask_id, None] = end
        for entries in _parts(process.vocab_size, size // len(others)):
            total -= _read(table, kind[part], others[:, entries], log_total)
    total += 2 * table[0, kind, -1].sum()
    for part in _parts(len(clean), size // len(nodes)):
        level = nodes[:, None].expand(-1, len(clean[part]))
        x, z, zeros = clean[part].expand_as(level), noised[part].expand_as(level), torch.zeros_like(log_odds[part])
        sums = VocabularySums(log_odds[part], log_p_noised[part], log1p_sum=zeros)
        total += weights @ terms_from_sums(sums, x, z, level, process=process).loss.sum(-1)
    return float(total)


def _parts(length: int, step: int) -> Iterator[slice]:
    """Yield the parts of 0..length, at most `step` numbers each or else one."""
    for first in range(0, length, max(1, step)):
        yield slice(first, first + max(1, step))


def _sums(logits: Tensor, x: Tensor, z: Tensor, process: NoiseProcess) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the logits in float64, -inf at x and at the mask [n, V]; log of the sum of all e^logit [n, 1]; log odds of
    x and log p_z, [n]."""
    others = logits[:, : process.vocab_size].to(torch.float64, copy=True)
    others[:, process.mask_id] = -torch.inf
    at_clean, at_noised = (others.gather(-1, ids.unsqueeze(-1)) for ids in (x, z))
    others.scatter_(-1, x.unsqueeze(-1), -torch.inf)
    rest = torch.logsumexp(others, dim=-1, keepdim=True)
    log_total = torch.logaddexp(rest, at_clean)
    return others, log_total, (rest - at_clean).squeeze(-1), (at_noised - log_total).squeeze(-1)


def _read(table: Tensor, kind: Tensor, logits: Tensor, log_total: Tensor) -> Tensor:
    """Return the sum of F(log p), with log p = logits - log_total, by the table of each token's kind."""
    first = kind.unsqueeze(-1) * table.shape[-1]
    last = first + (table.shape[-1] - 1)
    # Depth of log p below 0 in points of the table, counted from the first point of the first kind.
    depth = torch.add(log_total / _FINE_SPACING + first, logits, alpha=-1.0 / _FINE_SPACING)
    index = depth.round()
    is_below, factor = None, None
    if bool((index.amax(dim=-1, keepdim=True) > last).any()):  # below the table, F is proportional to p
        is_below = index > last
        factor = torch.exp(_FINE_SPACING * (last - depth)[is_below])
        depth, index = torch.minimum(depth, last), torch.minimum(index, last.to(index.dtype))
    place = index.int().flatten()
    offset = index.sub_(depth)
    value = offset.new_zeros(())
    for row in table.flip(0):  # index_select is three times as fast as indexing or `take`
        found = row.flatten().index_select(0, place).view_as(offset)
        value = found.addcmul_(value, offset) if value.dim() else found
    if is_below is not None and factor is not None:
        value[is_below] *= factor
    return value.sum()


@lru_cache(maxsize=256)
def _levels(counts: tuple[int, int, int], process: NoiseProcess) -> _Levels:
    nodes, spans = _quadrature(counts, process)
    log_q = _log_likelihood(nodes, counts, process)
    weights = spans * torch.exp(log_q - log_q.max())
    weights = weights / (weights * torch.sigmoid(nodes) * torch.sigmoid(-nodes)).sum()
    return _Levels(nodes, weights, _table(nodes, weights, process))


def _quadrature(counts: tuple[int, int, int], process: NoiseProcess) -> tuple[Tensor, Tensor]:
    """Return Gauss-Legendre nodes and weights [S] over the levels that may have made such a copy."""
    low, high = _support(_COARSE, counts, process)
    low, high = _support(torch.linspace(low, high, _FINE, dtype=torch.float64), counts, process)
    panels = max(2, math.ceil((high - low) / _PANEL))
    half = (high - low) / panels / 2
    middles = low + half * (2 * torch.arange(panels, dtype=torch.float64) + 1)
    points, weights = _RULE
    return (middles[:, None] + half * points).flatten(), (half * weights).repeat(panels)


def _support(grid: Tensor, counts: tuple[int, int, int], process: NoiseProcess) -> tuple[float, float]:
    """Return the ends of the stretch of the grid outside which both integrals are negligible, a point further out.

    The bound's integrand is at most about alpha times the largest weight; that of the denominator is alpha beta. A copy
    of kept tokens alone carries little information on its level, and the upper end of its integrand depends on p_x
    (`HIGHEST`), so its range extends to the end of the grid.
    """
    log_q, log_alpha = _log_likelihood(grid, counts, process), logsigmoid(grid)
    peaks = [log_q + log_alpha + logsigmoid(-grid)]
    if counts[0] or counts[2]:
        peaks.append(log_q + log_alpha)
    matters = torch.stack([peak > peak.max() + _NEGLIGIBLE for peak in peaks]).any(dim=0)
    if not (counts[0] or counts[2]):
        matters = matters | (grid > grid[matters][0])
    found = torch.nonzero(matters).flatten()
    first, last = max(0, int(found[0]) - 1), min(len(grid) - 1, int(found[-1]) + 1)
    return float(grid[first]), float(grid[last])


def _log_likelihood(log_snr: Tensor, counts: tuple[int, int, int], process: NoiseProcess) -> Tensor:
    """Return log q_lambda(z | x) of a copy with these numbers of masks, kept and changed tokens."""
    log_alpha, log_beta = logsigmoid(log_snr), logsigmoid(-log_snr)
    log_c = log_beta + process.log_u(log_snr) - math.log(process.num_real)
    log_mask = log_beta + logsigmoid(-process.logit_u(log_snr))
    parts = (log_mask, torch.logaddexp(log_alpha, log_c), log_c)
    total = torch.zeros_like(log_snr)
    for count, part in zip(counts, parts, strict=True):
        if count:  # avoids 0 times an infinite logarithm
            total = total + count * part
    return total


def _table(nodes: Tensor, weights: Tensor, process: NoiseProcess) -> Tensor:
    """Return the Taylor coefficients of F (`_Levels.table`).

    Derivatives of log(1 + e^t) are polynomials in s = sigmoid(t); each is s (1 - s) times the one before's derivative.
    """
    log_rho = process.log_rho(nodes)
    alpha = torch.sigmoid(nodes)
    c = torch.where(log_rho <= LOG_RHO_LIMIT, alpha * torch.exp(-log_rho.clamp(max=LOG_RHO_LIMIT)), 0.0)
    held = log_rho.clamp(max=LOG_RHO_LIMIT)
    x, other = [token for token in range(3) if token != process.mask_id][:2]
    tokens = {"mask": process.mask_id, "kept": x, "changed": other}
    factor = torch.stack(
        [
            weights * c * process.weight(nodes, torch.full(nodes.shape, x), torch.full(nodes.shape, tokens[kind]))
            for kind in _KINDS
        ]
    )  # [3, S]
    size = 2 + math.ceil((float(held.max()) + _LINEAR) / _SPACING)
    t = held[:, None] - _SPACING * torch.arange(max(2, size), dtype=torch.float64)  # [S, G]
    found = [factor @ torch.nn.functional.softplus(t, threshold=40.0)]
    s, polynomial = torch.sigmoid(t), np.array([0.0, 1.0])
    for order in range(1, _ORDER):
        found.append(_SPACING**order * factor @ _value(polynomial / math.factorial(order), s))
        polynomial = np.polynomial.polynomial.polymul(np.polynomial.polynomial.polyder(polynomial), [0.0, 1.0, -1.0])
    return _refined(torch.stack(found))


def _refined(table: Tensor) -> Tensor:
    """Return the first `_FINE_ORDER` coefficients at `_FINE_SPACING`, in units of it, of a table at `_SPACING`.

    Both begin at log p = 0 and end at the same point. A point's polynomial is expanded around the finer ones near it.
    """
    found = torch.einsum("ops,pkg->okgs", _expansion(), table).flatten(-2)
    first = _FINENESS // 2  # as many finer points lie before a point as after it, but for the last one
    return found[..., first : first + (table.shape[-1] - 1) * _FINENESS + 1].contiguous()


@cache
def _expansion() -> Tensor:
    """Return the share of each coefficient in those of the finer points around a point, [_FINE_ORDER, _ORDER,
    _FINENESS]."""
    order, power = torch.arange(_FINE_ORDER).reshape(-1, 1, 1), torch.arange(_ORDER).reshape(-1, 1)
    step = torch.arange(_FINENESS, dtype=torch.float64) - _FINENESS // 2
    binomial = torch.tensor([[math.comb(p, o) for p in range(_ORDER)] for o in range(_FINE_ORDER)])
    moved = (-step / _FINENESS) ** (power - order).clamp(min=0)
    return binomial.unsqueeze(-1) * moved / float(_FINENESS) ** order


def _value(polynomial: npt.NDArray[np.float64], s: Tensor) -> Tensor:
    """Return the polynomial without a constant term at s, by Horner's rule; small s keep their relative precision."""
    value = torch.full_like(s, float(polynomial[-1]))
    for coefficient in polynomial[-2:0:-1]:
        value = value * s + float(coefficient)
    return value * s


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
    share = process.exact_uniform_prob(np.clip(log_snr, -_MAX_LOG_SNR, _MAX_LOG_SNR))
    return np.where(words[1] < threshold(share), token, process.mask_id)
