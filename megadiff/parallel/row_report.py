"""What a microbatch reports beside its loss: sums over tokens and rows, and the metrics of a step they add up to."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from megadiff.diffusion.conditioning import Levels
from megadiff.diffusion.noising import NoisedRows
from megadiff.diffusion.objective import Terms

BIN_EDGES = (-9.0, -6.0, -3.0, 0.0, 3.0, 6.0, 9.0)
"""Edges of the log-SNR bins, in nats; the outer bins take what lies beyond."""

_MEANS = ("loss", "elbo", "kl", "is", "mean_weight")
_KINDS = ("isotropic", "anisotropic", "conditioned")
_SHARES = ("independent", "linear", "prompted", "infilled", "empty")
_LAYOUT = (
    *_MEANS,
    "noisy_tokens",
    "rows",
    "tokens",
    *_SHARES,
    *(f"{kind}/{what}" for kind in _KINDS for what in ("elbo", "tokens")),
    *(f"bin{index}/{what}" for index in range(len(BIN_EDGES) - 1) for what in ("loss", "tokens")),
)
SIZE = len(_LAYOUT)
"""Length of the vector `report_sums` makes."""


def report_sums(terms: Terms, rows: NoisedRows) -> Tensor:
    """Sums over one microbatch, [SIZE] float64 on its device.

    Args:
        terms: sequence first, [L, b]; 0 at noise-free positions.
        rows: the microbatch, [b, L].
    """
    elbo = terms.elbo.detach().double()
    plain = (terms.weight * (terms.kl + terms.is_div)).detach().double()
    noisy = rows.is_noisy.t()
    means = (terms.loss, terms.elbo, terms.weight * terms.kl, terms.weight * terms.is_div, terms.weight)
    sums = [value.detach().double().sum() for value in means]
    sums += [noisy.sum(), _count(rows.levels.shape[0], noisy), _count(noisy.numel(), noisy)]
    prompted, kept = rows.prompt_length.to(noisy.device) > 0, ~rows.is_noisy.all(1)
    sums += [(rows.levels == Levels.INDEPENDENT).sum(), (rows.levels == Levels.LINEAR).sum(), prompted.sum()]
    sums += [(kept & ~prompted).sum(), (rows.source.diff(dim=1) == 0).sum()]
    isotropic = rows.levels == Levels.ISOTROPIC
    for of_kind in (isotropic & ~kept, ~isotropic & ~kept, kept):
        sums += [(elbo * of_kind).sum(), (noisy & of_kind).sum()]
    edges = torch.tensor(BIN_EDGES[1:-1], device=noisy.device)
    which = torch.bucketize(rows.log_snr, edges, right=True).t()
    for index in range(len(BIN_EDGES) - 1):
        inside = noisy & (which == index)
        sums += [(plain * inside).sum(), inside.sum()]
    return torch.stack([value.double() for value in sums])


def mean_loss(total: Tensor) -> Tensor:
    """`loss` of `metrics_of` alone, a float64 scalar still on its device."""
    return total[_LAYOUT.index("loss")] / total[_LAYOUT.index("noisy_tokens")].clamp(min=1.0)


def has_finite_loss(reports: Tensor) -> Tensor:
    """Which microbatches' `loss` and `elbo` are finite: [M, SIZE] -> [M] bool."""
    return torch.isfinite(reports[:, [_LAYOUT.index("loss"), _LAYOUT.index("elbo")]]).all(dim=1)


def metrics_of(total: list[float]) -> dict[str, Any]:
    """Metrics of a step from the sums over the whole run's batch.

    Keys: `loss`, `elbo`, `kl`, `is`, `mean_weight` (means per noisy token), `noisy_tokens`; where some rows are
    conditioned, also `elbo_isotropic` (a bound of one generative process), `elbo_anisotropic`, `elbo_conditioned` and
    `share_independent`, ... (realised shares of rows; of tokens for `share_empty`); `loss_by_log_snr`, a list of
    [low, high, mean of w (KL + IS)] of the bins that had tokens.
    """
    found = dict(zip(_LAYOUT, total, strict=True))
    line: dict[str, Any] = {name: found[name] / max(found["noisy_tokens"], 1.0) for name in _MEANS}
    line["noisy_tokens"] = int(found["noisy_tokens"])
    if found["isotropic/tokens"] != found["tokens"]:
        for kind in _KINDS:
            if found[f"{kind}/tokens"]:
                line[f"elbo_{kind}"] = found[f"{kind}/elbo"] / found[f"{kind}/tokens"]
        for share in _SHARES:
            line[f"share_{share}"] = found[share] / found["tokens" if share == "empty" else "rows"]
    line["loss_by_log_snr"] = [
        [low, high, found[f"bin{index}/loss"] / found[f"bin{index}/tokens"]]
        for index, (low, high) in enumerate(itertools.pairwise(BIN_EDGES))
        if found[f"bin{index}/tokens"]
    ]
    return line


def _count(value: int, like: Tensor) -> Tensor:
    return torch.tensor(value, device=like.device)
