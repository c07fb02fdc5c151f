"""Report of a microbatch beside its loss: sums over tokens and sequences, and the metrics of a step computed from
them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
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
_PLACES = {name: place for place, name in enumerate(_LAYOUT)}
_INNER_EDGES = np.array(BIN_EDGES[1:-1], dtype=np.float32)


class Work(NamedTuple):
    """Counts of the computation done, in the units by which FLOPs are counted."""

    tokens: float
    """Number of tokens that passed through the layers."""
    head_tokens: float
    """Number of tokens whose logits were computed: under masked noise only the masks."""
    pairs: float
    """Number of (query, key) pairs whose attention score was computed in one layer, without a sink's."""


class SequenceCounts(NamedTuple):
    """The part of a microbatch's report that its sequences alone determine, counted on the host they come from."""

    totals: Tensor
    """The report, [SIZE] float64, with 0 where the loss is needed."""
    kinds: Tensor
    """Indicator of each sequence's kind among `_KINDS`, [4, b] float64 of 0 and 1."""
    has_level: Tensor | None
    """Mask of the sequences that have noise levels, [b] bool; None if all have."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> SequenceCounts:
        """Return the counts with `move` applied to their tensors."""
        has_level = None if self.has_level is None else move(self.has_level)
        return SequenceCounts(move(self.totals), move(self.kinds), has_level)


def sequence_counts(sequences: NoisedBatch, *, pairs: int | None = None) -> SequenceCounts:
    """Count what a report needs of a microbatch on the CPU.

    Args:
        sequences: the microbatch, [b, L].
        pairs: number of (query, key) pairs of one layer (`AttentionPattern.pairs`); None for all.
    """
    is_noisy, pattern, source = (tensor.numpy() for tensor in (sequences.is_noisy, sequences.pattern, sequences.source))
    num_sequences, length = is_noisy.shape
    noisy, is_next_token = is_noisy.sum(axis=1), pattern == NoisePattern.NEXT_TOKEN
    is_unconditioned, is_isotropic = noisy == length, pattern == NoisePattern.ISOTROPIC
    is_kept = ~(is_unconditioned | is_next_token)
    is_prompted = (sequences.prompt_length.numpy() > 0) & is_kept
    counts = {
        "noisy_tokens": noisy.sum(),
        "sequences": num_sequences,
        "tokens": num_sequences * length,
        "per_token_noise": (pattern == NoisePattern.PER_TOKEN).sum(),
        "linear_noise": (pattern == NoisePattern.LINEAR).sum(),
        "prompt": is_prompted.sum(),
        "infilling": (is_kept & ~is_prompted).sum(),
        "pad_insertion": (source[:, 1:] == source[:, :-1]).sum(),
        "pairs": num_sequences * length * length if pairs is None else pairs,
    }
    kinds = np.stack((is_isotropic & is_unconditioned, ~is_isotropic & is_unconditioned, is_kept, is_next_token))
    counts |= {f"{kind}/tokens": count for kind, count in zip(_KINDS, (kinds @ noisy).tolist(), strict=True)}
    has_level = None if not is_next_token.any() else ~is_next_token
    counted = is_noisy if has_level is None else is_noisy & has_level[:, None]
    which = np.searchsorted(_INNER_EDGES, sequences.log_snr.numpy()[counted], side="right")
    for index, count in enumerate(np.bincount(which, minlength=len(BIN_EDGES) - 1).tolist()):
        counts[f"bin{index}/tokens"] = count
    totals = np.zeros(SIZE)
    totals[[_PLACES[name] for name in counts]] = list(counts.values())
    return SequenceCounts(
        torch.from_numpy(totals),
        torch.from_numpy(kinds.astype(np.float64)),
        None if has_level is None else torch.from_numpy(has_level),
    )


def report_sums(
    terms: Terms, sequences: NoisedBatch, counts: SequenceCounts, *, head_tokens: int | None = None
) -> Tensor:
    """Return sums over one microbatch, [SIZE] float64 on its device; the host does not wait for them.

    It uses few large operations rather than a few for each number.

    Args:
        terms: sequence first, [L, b]; 0 at noise-free positions.
        sequences: the microbatch, [b, L].
        counts: its counts, on the same device.
        head_tokens: number of tokens whose logits were computed; None for all.
    """
    kl, itakura_saito = terms.weight * terms.kl, terms.weight * terms.itakura_saito
    means = torch.stack((terms.loss, terms.elbo, kl, itakura_saito, terms.weight)).detach()
    of_sequences = means.sum(dim=1, dtype=torch.float64)  # [5, b]
    plain = (terms.weight * (terms.kl + terms.itakura_saito)).detach()
    edges, bins, places = _on_device(plain.device)
    inside = torch.bucketize(sequences.log_snr, edges, right=True).t() == bins  # [bins, L, b]
    if counts.has_level is not None:
        inside = inside & counts.has_level
    by_bin = (inside * plain).flatten(1).sum(1, dtype=torch.float64)
    head = by_bin.new_full((1,), plain.numel() if head_tokens is None else head_tokens)
    of_loss = torch.cat((of_sequences.sum(1), counts.kinds @ of_sequences[1], by_bin, head))
    return counts.totals.index_copy(0, places, of_loss)


@cache
def _on_device(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inner bin edges, the bins' numbers [bins, 1, 1], and the places of what the loss determines.

    They are cached per device: creating a tensor from numbers waits for the device.
    """
    bins = len(BIN_EDGES) - 1
    names = (*_MEANS, *(f"{kind}/elbo" for kind in _KINDS), *(f"bin{index}/loss" for index in range(bins)))
    return (
        torch.tensor(BIN_EDGES[1:-1], device=device),
        torch.arange(bins, device=device).reshape(-1, 1, 1),
        torch.tensor([_PLACES[name] for name in (*names, "head_tokens")], device=device),
    )


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
