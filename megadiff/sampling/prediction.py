"""A model's logits as a distribution over clean tokens: temperature, truncation, and draws from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.diffusion.mixing_base import Mixing


@dataclass(frozen=True)
class Prediction:
    """The predicted clean distribution of every position.

    `probs` is [B, L, V], float32 or float64, 0 at the mask, each row summing to 1.
    """

    probs: Tensor

    def at(self, ids: Tensor) -> Tensor:
        """Probability of the given ids, [B, L]."""
        return self.probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def predict(
    logits: Tensor,
    mixing: Mixing,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Prediction:
    """Softmax over the real tokens, tempered and truncated.

    Args:
        logits: [B, L, V or more], any float dtype; taken in float32 (float64 stays). Padding columns are dropped.
        mixing: says which token is the mask.
        temperature: divides the logits; 0 puts everything on the most probable token (the lowest id among equals).
        top_k: keep the k most probable tokens (and any equal to the last of them).
        top_p: keep the most probable tokens up to and including the one at which their sum reaches p.

    Raises:
        ValueError: a negative temperature, top_k below 1, top_p outside (0, 1], too few logits.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            "temperature must be at least 0, top_k at least 1 and top_p in (0, 1], "
            f"got temperature={temperature}, top_k={top_k}, top_p={top_p}"
        )
    if logits.shape[-1] < mixing.vocab_size:
        raise ValueError(f"expected at least {mixing.vocab_size} logits a token, got {logits.shape[-1]}")
    values = logits[..., : mixing.vocab_size]
    values = values.clone() if values.dtype == torch.float64 else values.to(torch.float32, copy=True)
    values[..., mixing.mask_id] = -torch.inf
    if temperature == 0:
        best = values.argmax(dim=-1, keepdim=True)
        return Prediction(torch.zeros_like(values).scatter_(-1, best, 1.0))
    values /= temperature
    if top_k is not None and top_k < mixing.num_real:
        values.masked_fill_(values < values.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    probs = values.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        probs = _truncate(probs, top_p)
    return Prediction(probs)


def draw_tokens(prediction: Prediction, where: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens for the positions that are true in `where`, by inversion of the cumulative distribution.

    Args:
        prediction: probabilities [B, L, V].
        where: [B, L] bool, n of them true.
        uniforms: [B, L] numbers on [0, 1), of which those at `where` are used.

    Returns:
        [n] int64 ids of positive probability. Sums run in float64: in float32 a vocabulary of 131072 tokens would
        leave its last ones too much or too little.
    """
    cumulative = prediction.probs[where].double().cumsum(dim=-1)
    target = uniforms[where].double().unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=prediction.probs.shape[-1] - 1)


def _truncate(probs: Tensor, top_p: float) -> Tensor:
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    truncated = torch.zeros_like(probs).scatter_(-1, order, kept)
    return truncated / truncated.sum(dim=-1, keepdim=True)
