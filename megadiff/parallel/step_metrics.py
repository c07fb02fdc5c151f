"""Report of a microbatch beside its loss: sums over tokens and sequences, and the metrics of a step computed from
them."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadiff.diffusion.conditioning import NoisePattern
from megadiff.diffusion.noising import NoisedBatch
from megadiff.diffusion.objective import Terms

BIN_EDGES = (-9.0, -6.0, -3.0, 0.0, 3.0, 6.0, 9.0)
"""Edges of the log-SNR bins, in nats; the outer bins include everything beyond."""

_MEANS = ("loss", "elbo", "kl", "itakura_saito", "weight")
_KINDS = ("isotropic", "anisotropic", "conditioned", "next_token")
_FRACTIONS = ("per_token_noise", "linear_noise", "prompt", "infilling", "pad_insertion")
"""Names of `conditioning.*`, of which the metrics report what was drawn."""
_LAYOUT = (
    *_MEANS,
    "noisy_tokens",
    "sequences",
    "tokens",
    *_FRACTIONS,
    *(f"{kind}/{what}" for kind in _KINDS for what in ("elbo", "tokens")),
    *(f"bin{index}/{what}" for index in range(len(BIN_EDGES) - 1) for what in ("loss", "tokens")),
    "head_tokens",
    "pairs",
)
SIZE = len(_LAYOUT)
"""Length of the vector that `report_sums` returns."""


class Work(NamedTuple):
    """Counts of the computation done, in the units by which FLOPs are counted."""

    tokens: float
    """Number of tokens that passed through the layers."""
    head_tokens: float
    """Number of tokens whose logits were computed: under masked noise only the masks."""
    pairs: float
    """Number of (query, key) pairs whose attention score was computed in one layer, without a sink's."""


def report_sums(
    terms: Terms, sequences: NoisedBatch, *, pairs: int | None = None, head_tokens: int | None = None
) -> Tensor:
    """Return sums over one microbatch, [SIZE] float64 on its device; the host does not wait for them.

    It uses few large operations rather than a few for each number.

    Args:
        terms: sequence first, [L, b]; 0 at noise-free positions.
        sequences: the microbatch, [b, L]; prompt lengths may be on the CPU.
        pairs: number of (query, key) pairs of one layer (`AttentionPattern.pairs`); None for all.
        head_tokens: number of tokens whose logits were computed; None for all.
    """
    noisy = sequences.is_noisy.t()
    plain = terms.weight * (terms.kl + terms.itakura_saito)
    means = (terms.loss, terms.elbo, terms.weight * terms.kl, terms.weight * terms.itakura_saito, terms.weight)
    of_sequences = torch.stack((*means, noisy.to(plain.dtype))).detach().sum(dim=1, dtype=torch.float64)  # [6, b]
    facts = _sequence_facts(sequences)
    shared, kinds = facts.split((facts.shape[0] - len(_KINDS), len(_KINDS)))
    by_kind = kinds @ of_sequences[1::4].t()  # elbo and tokens
    which = torch.bucketize(sequences.log_snr, _inner_edges(noisy.device), right=True).t()
    has_level = noisy & (sequences.pattern != NoisePattern.NEXT_TOKEN)
    inside = (which == torch.arange(len(BIN_EDGES) - 1, device=noisy.device)[:, None, None]) & has_level  # [bins, L, b]
    by_bin = torch.stack(((inside * plain.detach()).flatten(1).sum(1, dtype=torch.float64), inside.flatten(1).sum(1)))
    tokens, length = noisy.numel(), noisy.shape[0]
    head = by_kind.new_full((1,), tokens if head_tokens is None else head_tokens)
    attended = by_kind.new_full((1,), tokens * length if pairs is None else pairs)
    return torch.cat((of_sequences.sum(1), shared.sum(1), by_kind.flatten(), by_bin.t().flatten(), head, attended))


def _sequence_facts(sequences: NoisedBatch) -> Tensor:
    """Return each sequence's contribution to the counts from `sequences` to `pad_insertion`, then 1 for its kind,
    float64."""
    length = sequences.is_noisy.shape[1]
    pattern, is_unconditioned = sequences.pattern, sequences.is_noisy.all(dim=1)
    is_next_token = pattern == NoisePattern.NEXT_TOKEN
    is_kept = ~(is_unconditioned | is_next_token)
    is_prompted = (sequences.prompt_length.to(is_kept.device, non_blocking=True) > 0) & is_kept
    is_isotropic = pattern == NoisePattern.ISOTROPIC
    facts = (pattern == NoisePattern.PER_TOKEN, pattern == NoisePattern.LINEAR, is_prompted, is_kept & ~is_prompted)
    kinds = (is_isotropic & is_unconditioned, ~is_isotropic & is_unconditioned, is_kept, is_next_token)
    drawn, kind = torch.stack((*facts, *kinds)).double().split((len(facts), len(kinds)))
    empty = (length - 1 - sequences.source.diff(dim=1).count_nonzero(dim=1)).double()
    one = torch.ones_like(empty)
    return torch.cat((torch.stack((one, one * length)), drawn, empty.unsqueeze(0), kind))


@cache
def _inner_edges(device: torch.device) -> Tensor:
    """Return the bin edges, cached per device: creating a tensor from numbers waits for the device."""
    return torch.tensor(BIN_EDGES[1:-1], device=device)


def work_of(total: list[float]) -> Work:
    """Return the work of a step from the sums over the whole run's batch."""
    found = dict(zip(_LAYOUT, total, strict=True))
    return Work(found["tokens"], found["head_tokens"], found["pairs"])


def mean_loss(total: Tensor) -> Tensor:
    """Return only the `loss` of `metrics_of`, a float64 scalar still on its device."""
    return total[_LAYOUT.index("loss")] / total[_LAYOUT.index("noisy_tokens")].clamp(min=1.0)


def has_finite_loss(reports: Tensor) -> Tensor:
    """Return whether each microbatch's `loss` and `elbo` are finite: [M, SIZE] -> [M] bool."""
    return torch.isfinite(reports[:, [_LAYOUT.index("loss"), _LAYOUT.index("elbo")]]).all(dim=1)


def metrics_of(total: list[float]) -> dict[str, Any]:
    """Return the metrics of a step from the sums over the whole run's batch.

    Keys: `loss`, `elbo`, `kl`, `itakura_saito`, `weight` (means per noisy token), `noisy_tokens`; where some
    sequences are conditioned, also `elbo_isotropic` (a bound of one generative process), `elbo_anisotropic`,
    `elbo_conditioned`, `elbo_next_token` (an exact likelihood) and `fraction_per_token_noise`, ... (realised fractions
    of sequences; of tokens for `fraction_pad_insertion`); `loss_by_log_snr`, a list of [low, high, mean of
    w (KL + IS)] of the bins that had tokens.
    """
    found = dict(zip(_LAYOUT, total, strict=True))
    line: dict[str, Any] = {name: found[name] / max(found["noisy_tokens"], 1.0) for name in _MEANS}
    line["noisy_tokens"] = int(found["noisy_tokens"])
    if found["isotropic/tokens"] != found["tokens"]:
        for kind in _KINDS:
            if found[f"{kind}/tokens"]:
                line[f"elbo_{kind}"] = found[f"{kind}/elbo"] / found[f"{kind}/tokens"]
        for name in _FRACTIONS:
            line[f"fraction_{name}"] = found[name] / found["tokens" if name == "pad_insertion" else "sequences"]
    line["loss_by_log_snr"] = [
        [low, high, found[f"bin{index}/loss"] / found[f"bin{index}/tokens"]]
        for index, (low, high) in enumerate(itertools.pairwise(BIN_EDGES))
        if found[f"bin{index}/tokens"]
    ]
    return line
