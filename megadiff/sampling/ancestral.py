"""Ancestral sampling: noise to text, one reverse step of the forward process at a time.

From a noisier level t to a cleaner level s the forward kernel is q_{t|s}(z_t | z_s) = alpha_{t|s} 1[z_t = z_s] +
(beta pi)_{t|s}[z_t], and Bayes' rule with the predicted clean distribution p gives, per token,

    p(z_s = v | z_t) = q_s(p)[v] (alpha_{t|s} 1[v = z_t] + (beta pi)_{t|s}[z_t]) / q_t(p)[z_t]

with q_s(p) = alpha_s p + beta_s pi_s (arXiv:2512.10858, section 2.2). Read as a mixture, a step either keeps the
token, with weight alpha_{t|s} q_s(p)[z_t], or draws a fresh one from q_s(p), with weight (beta pi)_{t|s}[z_t]: which is
how `sample` draws, so that only tokens that are drawn afresh cost a draw over the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megadiff.diffusion import snr
from megadiff.diffusion.mixing_base import Mixing
from megadiff.diffusion.philox import Stream, below, unit_interval
from megadiff.sampling.prediction import Prediction, draw_tokens, predict

Denoise = Callable[[Tensor], Tensor]
"""Token ids [B, L] int64 -> logits [B, L, V or more]; the mask's logit and padding columns are ignored."""


OnStep = Callable[[int, float, Tensor], None]
"""Called with the number of steps left, the level and the ids."""


def reverse_posterior(
    probs: Tensor, noised: Tensor, log_snr_t: Tensor | float, log_snr_s: Tensor | float, *, mixing: Mixing
) -> Tensor:
    """p(z_s | z_t) under the predicted clean distribution.

    Rows that p makes impossible (a revealed token of probability 0, as temperature 0 gives under masked noise) keep
    z_t; rounding below 0 is clamped and rows are normalised, so no NaN ever comes out.

    Args:
        probs: [..., V] predicted clean distribution, 0 at the mask.
        noised: [...] ids z_t.
        log_snr_t, log_snr_s: lambda of the noisier and the cleaner level, numbers or [...].
        mixing: the noise.

    Returns:
        [..., V] probabilities, of `probs`' dtype.

    Raises:
        ValueError: shapes that do not fit, or lambda_s below lambda_t.
    """
    if probs.shape != (*noised.shape, mixing.vocab_size):
        raise ValueError(f"probs must have shape {(*noised.shape, mixing.vocab_size)}, got {tuple(probs.shape)}")
    at_t = torch.as_tensor(log_snr_t, dtype=torch.float64, device=probs.device).expand(noised.shape)
    at_s = torch.as_tensor(log_snr_s, dtype=torch.float64, device=probs.device).expand(noised.shape)
    if bool((at_s < at_t).any()):
        raise ValueError("log_snr_s must be at least log_snr_t: a reverse step goes to a cleaner level")
    keep, fresh = (part.to(probs.dtype) for part in _kernel(noised, at_t, at_s, mixing))
    stays = torch.zeros_like(probs).scatter_(-1, noised.unsqueeze(-1), 1.0)
    weight = mixing.marginal(probs, at_s.to(probs.dtype)) * (keep.unsqueeze(-1) * stays + fresh.unsqueeze(-1))
    weight = weight.clamp(min=0.0)
    total = weight.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weight / total.clamp(min=torch.finfo(probs.dtype).tiny), stays)


@torch.no_grad()
def sample(
    denoise: Denoise,
    *,
    rows: int,
    length: int,
    steps: int,
    mixing: Mixing,
    seed: int,
    grid: Literal["cosine", "linear"] = "cosine",
    min_log_snr: float = -9.0,
    max_log_snr: float = 9.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prompt: Tensor | None = None,
    row_index: Tensor | None = None,
    reuse_logits: bool = True,
    on_step: OnStep | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw rows of text, starting from noise at min_log_snr and ending with no mask left.

    Every draw is a function of (seed, row index, step, position): a row's text does not depend on how many rows are
    sampled together or in which order (as far as `denoise` itself does not).

    Args:
        denoise: the model; it is told the tokens, not the noise level.
        rows, length: shape [rows, length] of the result.
        steps: reverse steps, at least 1; `denoise` is called at most steps + 1 times.
        mixing, seed: the noise the model was trained on; any integer.
        grid, min_log_snr, max_log_snr: the levels visited (see `level_grid`).
        temperature: of the prediction's softmax; 0 takes the most probable token.
        top_k, top_p: keep only the k most probable tokens, or the fewest that together reach p.
        prompt: [rows, P] ids, P <= length, never changed; -1 marks a position to be generated (infilling).
        row_index: [rows] int64, what keys each row's draws; default 0..rows-1.
        reuse_logits: skip the model where a step changed no token (it would answer the same).
        on_step: called as on_step(k, lambda_k, ids) before the step from level k and, with k = 0, at the end.
        device: where the ids live.

    Returns:
        [rows, length] int64 ids without any mask.

    Raises:
        ValueError: arguments that do not fit together.
    """
    if steps < 1 or rows < 0 or length < 0:
        raise ValueError(f"steps must be at least 1, rows and length at least 0, got {steps}, {rows}, {length}")

    def ask(ids: Tensor) -> Prediction:
        return predict(denoise(ids), mixing, temperature=temperature, top_k=top_k, top_p=top_p)

    index = torch.arange(rows) if row_index is None else row_index

    def uniforms(k: int) -> Tensor:
        return _uniforms(seed, index, length, draw=k, device=ids.device)

    fixed, ids = _start(rows, length, mixing, min_log_snr, seed, index, prompt, device)
    levels = level_grid(steps, grid=grid, min_log_snr=min_log_snr, max_log_snr=max_log_snr)
    return _walk(ask, uniforms, ids, fixed, levels, mixing, reuse_logits=reuse_logits, on_step=on_step)


def reverse_step(
    prediction: Prediction, ids: Tensor, log_snr_t: float, log_snr_s: float, uniforms: Tensor, *, mixing: Mixing
) -> Tensor:
    """Draw z_s ~ `reverse_posterior` for every token, [B, L], from three uniform numbers a token, [3, B, L].

    The first chooses a token, of the vocabulary or of the noise, the second keep or fresh, the third signal or noise.
    """
    at_t = torch.full(ids.shape, log_snr_t, dtype=torch.float64, device=ids.device)
    at_s = torch.full(ids.shape, log_snr_s, dtype=torch.float64, device=ids.device)
    keep, fresh = _kernel(ids, at_t, at_s, mixing)
    alpha_s, beta_s = snr.alpha(at_s), snr.beta(at_s)
    marginal = alpha_s * prediction.at(ids).double() + beta_s * mixing.pi_at(at_s, ids)
    is_fresh = uniforms[1] * (keep * marginal + fresh) < fresh  # never where neither is possible: the token stays
    is_signal = uniforms[2] < alpha_s
    is_mask = (uniforms[2] - alpha_s) < beta_s * mixing.mask_share(at_s)
    real = (uniforms[0] * mixing.num_real).long().clamp(max=mixing.num_real - 1)
    real = real + (real >= mixing.mask_id).long()
    drawn = torch.where(is_mask, mixing.mask_id, real)
    from_model = is_fresh & is_signal
    drawn[from_model] = draw_tokens(prediction, from_model, uniforms[0])
    return torch.where(is_fresh, drawn, ids)


def level_grid(
    steps: int, *, grid: Literal["cosine", "linear"] = "cosine", min_log_snr: float = -9.0, max_log_snr: float = 9.0
) -> list[float]:
    """Lambda_0 = max_log_snr down to lambda_steps = min_log_snr.

    alpha_k = sigmoid(min) + (sigmoid(max) - sigmoid(min)) share_k, lambda_k = log(alpha_k / beta_k), with beta_k made
    the same way from the other end, so that neither end loses digits.

    Raises:
        ValueError: a grid by another name.
    """
    if grid not in ("cosine", "linear"):
        raise ValueError(f"grid must be cosine or linear, got {grid!r}")
    levels = []
    for k in range(steps + 1):
        t = k / steps
        clean, noise = (
            (1 - t, t) if grid == "linear" else (math.cos(math.pi * t / 2) ** 2, math.sin(math.pi * t / 2) ** 2)
        )
        alpha = _sigmoid(max_log_snr) * clean + _sigmoid(min_log_snr) * noise
        beta = _sigmoid(-max_log_snr) * clean + _sigmoid(-min_log_snr) * noise
        levels.append(min(max(math.log(alpha / beta), min_log_snr), max_log_snr))
    return levels


def prior(rows: Tensor, length: int, log_snr: float, *, mixing: Mixing, seed: int) -> Tensor:
    """Noise to start from, [B, length]: masks or uniform real tokens by pi at this level; `rows` [B] keys the draws."""
    words = Stream(seed, "sample/prior").words(rows.cpu().numpy().astype(np.int64), length)
    token = below(words[2], words[3], mixing.num_real).astype(np.int64)
    token += token >= mixing.mask_id
    is_uniform = unit_interval(words[:2]) < mixing.uniform_share(log_snr)
    return torch.from_numpy(np.where(is_uniform, token, mixing.mask_id))


def _walk(
    ask: Callable[[Tensor], Prediction],
    uniforms: Callable[[int], Tensor],
    ids: Tensor,
    fixed: Tensor,
    levels: list[float],
    mixing: Mixing,
    *,
    reuse_logits: bool,
    on_step: OnStep | None,
) -> Tensor:
    """Reverse steps from the last level to the first, then fill whatever mask is left."""
    prediction: Prediction | None = None
    for k in range(len(levels) - 1, 0, -1):
        if on_step is not None:
            on_step(k, levels[k], ids)
        prediction = prediction or ask(ids)
        moved = reverse_step(prediction, ids, levels[k], levels[k - 1], uniforms(k), mixing=mixing)
        moved = torch.where(fixed, ids, moved)
        is_same = reuse_logits and torch.equal(moved, ids)
        ids, prediction = moved, prediction if is_same else None
    left = (ids == mixing.mask_id) & ~fixed
    if bool(left.any()):
        ids = ids.masked_scatter(left, draw_tokens(prediction or ask(ids), left, uniforms(0)[0]))
    if on_step is not None:
        on_step(0, levels[0], ids)
    return ids


def _start(
    rows: int,
    length: int,
    mixing: Mixing,
    log_snr: float,
    seed: int,
    index: Tensor,
    prompt: Tensor | None,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Which positions are fixed, and the first ids."""
    if index.shape != (rows,):
        raise ValueError(f"row_index must have shape ({rows},), got {tuple(index.shape)}")
    ids = prior(index, length, log_snr, mixing=mixing, seed=seed)
    fixed = torch.zeros(rows, length, dtype=torch.bool)
    if prompt is not None:
        if prompt.ndim != 2 or prompt.shape[0] != rows or prompt.shape[1] > length:
            raise ValueError(f"prompt must have shape ({rows}, at most {length}), got {tuple(prompt.shape)}")
        given = prompt.cpu()
        fixed[:, : given.shape[1]] = given >= 0
        ids[:, : given.shape[1]] = torch.where(given >= 0, given, ids[:, : given.shape[1]])
    return fixed.to(device), ids.to(device)


def _kernel(ids: Tensor, at_t: Tensor, at_s: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """alpha_{t|s} and (beta pi)_{t|s}[z_t], the latter >= 0, both [...]."""
    keep = snr.alpha(at_t) / snr.alpha(at_s)
    fresh = snr.beta(at_t) * mixing.pi_at(at_t, ids) - keep * snr.beta(at_s) * mixing.pi_at(at_s, ids)
    return keep, fresh.clamp(min=0.0)


def _uniforms(seed: int, rows: Tensor, length: int, *, draw: int, device: torch.device) -> Tensor:
    """Three uniform numbers on [0, 1) a token, [3, B, L] float64; the first has 53 bits, the others 32."""
    words = Stream(seed, "sample/step").words(rows.cpu().numpy().astype(np.int64), length, draw=draw)
    coins = [word.astype(np.float64) * 2.0**-32 for word in words[2:]]
    return torch.from_numpy(np.stack([unit_interval(words[:2]), *coins])).to(device)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
