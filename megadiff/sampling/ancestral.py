"""Ancestral sampling: noise to text, one reverse step of the forward process at a time.

From a noisier level t to a cleaner level s the forward kernel is q_{t|s}(z_t | z_s) = alpha_{t|s} 1[z_t = z_s] +
(beta pi)_{t|s}[z_t], and Bayes' rule with the predicted clean distribution p gives, per token,

    p(z_s = v | z_t) = q_s(p)[v] (alpha_{t|s} 1[v = z_t] + (beta pi)_{t|s}[z_t]) / q_t(p)[z_t]

with q_s(p) = alpha_s p + beta_s pi_s (arXiv:2512.10858, section 2.2). `reverse_posterior` is that formula over the
vocabulary; `standalone.reverse_step` draws from it, and uses the vocabulary only for tokens that are redrawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.shapes import Float, Int
from megadiff.sampling.standalone import (
    CounterRNG,
    Settings,
    Step,
    generate,
    log_snr_steps,
    reverse_kernel,
    reverse_step,
)

__all__ = ["Denoise", "OnStep", "log_snr_steps", "prior", "reverse_posterior", "reverse_step", "sample"]

Denoise = Callable[[Tensor], Tensor]
"""Model from token ids [B, L] int64 to logits [B, L, V or more]; the mask's logit and padding columns are ignored."""

OnStep = Callable[[int, float, Tensor], None]
"""Callback with the number of steps left, the level and the ids."""


def reverse_posterior(
    probs: Float[Tensor, "*axes V"],
    noised: Int[Tensor, "*axes"],
    log_snr_t: Float[Tensor, "*#axes"] | float,
    log_snr_s: Float[Tensor, "*#axes"] | float,
    *,
    mixing: NoiseProcess,
) -> Float[Tensor, "*axes V"]:
    """Return p(z_s | z_t) for the predicted clean distribution.

    Sequences that p makes impossible (a revealed token of probability 0, as temperature 0 gives under masked noise)
    keep z_t; rounding below 0 is clamped and sequences are normalised, so the result is never NaN.

    Args:
        probs: predicted clean distribution, 0 at the mask.
        noised: ids z_t.
        log_snr_t, log_snr_s: lambda of the noisier and the cleaner level.
        mixing: the noise.

    Returns:
        Probabilities in `probs`' dtype.

    Raises:
        ValueError: shapes that do not fit, or lambda_s below lambda_t.
    """
    if probs.shape != (*noised.shape, mixing.vocab_size):
        raise ValueError(f"probs must have shape {(*noised.shape, mixing.vocab_size)}, got {tuple(probs.shape)}")
    at_t = torch.as_tensor(log_snr_t, dtype=torch.float64, device=probs.device).expand(noised.shape)
    at_s = torch.as_tensor(log_snr_s, dtype=torch.float64, device=probs.device).expand(noised.shape)
    if bool((at_s < at_t).any()):
        raise ValueError("log_snr_s must be at least log_snr_t: a reverse step goes to a cleaner level")
    keep, fresh = (part.to(probs.dtype) for part in reverse_kernel(noised, at_t, at_s, mixing))
    stays = torch.zeros_like(probs).scatter_(-1, noised.unsqueeze(-1), 1.0)
    weight = mixing.marginal(probs, at_s.to(probs.dtype)) * (keep.unsqueeze(-1) * stays + fresh.unsqueeze(-1))
    weight = weight.clamp(min=0.0)
    total = weight.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weight / total.clamp(min=torch.finfo(probs.dtype).tiny), stays)


def sample(
    denoise: Denoise,
    *,
    sequences: int,
    length: int,
    steps: int,
    process: NoiseProcess,
    seed: int,
    grid: Literal["cosine", "linear"] = "cosine",
    min_log_snr: float = -9.0,
    max_log_snr: float = 9.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prompt: Int[Tensor, "{sequences} P"] | None = None,
    sequence_index: Int[Tensor, " {sequences}"] | None = None,
    reuse_logits: bool = True,
    on_step: OnStep | None = None,
    device: torch.device | str = "cpu",
) -> Int[Tensor, "{sequences} {length}"]:
    """Draw whole sequences of text at once, starting from noise at min_log_snr and ending without masks.

    This is the plain case of `standalone.generate`: one block, no end token.

    Args:
        denoise: the model; its input is the tokens without the noise level.
        sequences, length: shape [sequences, length] of the result.
        steps: reverse steps, at least 1; `denoise` is called at most steps + 1 times.
        process, seed: the noise the model was trained on; any integer.
        grid, min_log_snr, max_log_snr: the levels visited (see `log_snr_steps`).
        temperature: temperature of the prediction's softmax; 0 takes the most probable token.
        top_k, top_p: keep only the k most probable tokens, or the fewest that together reach p.
        prompt: ids, P <= length, never changed; -1 marks a position to be generated (infilling).
        sequence_index: numbers that key each sequence's draws; default 0..sequences-1.
        reuse_logits: skip the model if a step changed no token (its output would be the same).
        on_step: called as on_step(k, lambda_k, ids) before the step from level k and, with k = 0, at the end.
        device: device of the ids.

    Returns:
        Ids without any mask.

    Raises:
        ValueError: arguments that do not fit together.
    """
    if steps < 1 or sequences < 0 or length < 0:
        raise ValueError(
            f"steps must be at least 1, sequences and length at least 0, got {steps}, {sequences}, {length}"
        )
    if sequence_index is not None and sequence_index.shape != (sequences,):
        raise ValueError(f"sequence_index must have shape ({sequences},), got {tuple(sequence_index.shape)}")
    given = torch.empty(sequences, 0, dtype=torch.int64) if prompt is None else prompt
    if given.ndim != 2 or given.shape[0] != sequences or given.shape[1] > length:
        raise ValueError(f"prompt must have shape ({sequences}, at most {length}), got {tuple(given.shape)}")
    settings = Settings(
        max_new_tokens=length - given.shape[1],
        max_denoising_steps=steps,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        grid=grid,
        min_log_snr=min_log_snr,
        max_log_snr=max_log_snr,
        reuse_logits=reuse_logits,
    )

    def observe(step: Step) -> None:
        if on_step is not None:
            on_step(step.steps_left, step.log_snr, step.ids)

    found = generate(
        lambda ids, _prefix: denoise(ids),
        given.to(device),
        settings,
        process,
        seed=seed,
        sequences=sequence_index,
        prefix_length=0,
        on_step=observe,
    )
    return found.sequences


def prior(
    sequences: Int[Tensor, " B"], length: int, log_snr: float, *, process: NoiseProcess, seed: int
) -> Int[Tensor, "B {length}"]:
    """Noise to start from: masks or uniform real tokens by pi at this level; `sequences` keys the draws."""
    return CounterRNG(seed, sequences, sequences.device).noise(length, log_snr, process)
