"""What an output head is asked of its tokens, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.objective import SURROGATE, Terms, Weighting, check_token_shapes


@dataclass(frozen=True)
class Formula:
    """Objective to compute: arguments of `diffusion.objective.gidd_objective`."""

    process: NoiseProcess
    weighting: Weighting = SURROGATE


class HeadLoss(NamedTuple):
    """A head's answer."""

    loss: Tensor
    """Sum of the optimised term over the tokens computed, a scalar; it alone carries a gradient."""
    terms: Terms
    """Of every token, detached; 0 in every field where nothing was computed."""


@dataclass(frozen=True)
class HeadTokens:
    """Tokens in the order of the hidden states they go with."""

    clean: Tensor
    """[...] int64 ids x."""
    noised: Tensor
    """[...] int64 ids z."""
    log_snr: Tensor
    """[...] lambda."""
    computed: Tensor | None = None
    """[n] int64, places in the flattened axes of the tokens that are computed; None for all of them. The same on every
    rank that shares the vocabulary."""

    def check(self, hidden: Tensor) -> None:
        """Refuse shapes that do not agree.

        Raises:
            ValueError: they do not.
        """
        check_token_shapes(self.clean, self.noised, self.log_snr)
        if hidden.shape[:-1] != self.clean.shape:
            raise ValueError(f"hidden must have shape {(*self.clean.shape, '*')}, got {tuple(hidden.shape)}")

    def selected(self, dtype: torch.dtype) -> HeadTokens:
        """The tokens computed alone, [n]; levels in `dtype`, `computed` kept."""
        flat = (self.clean.reshape(-1), self.noised.reshape(-1), self.log_snr.reshape(-1).to(dtype))
        if self.computed is not None:
            flat = tuple(field[self.computed] for field in flat)
        return HeadTokens(*flat, computed=self.computed)

    def part(self, part: slice) -> HeadTokens:
        """A stretch of selected tokens."""
        return replace(self, clean=self.clean[part], noised=self.noised[part], log_snr=self.log_snr[part])

    def rows(self, part: slice) -> slice | Tensor:
        """Where a stretch of selected tokens stands among all of them."""
        return part if self.computed is None else self.computed[part]

    def scattered(self, values: Tensor) -> Tensor:
        """Values [n] of the tokens computed in the places of all of them, [...], with 0 elsewhere."""
        if self.computed is not None:
            values = values.new_zeros(self.clean.numel()).index_copy(0, self.computed, values)
        return values.reshape(self.clean.shape)


def worth_computing(noised: Tensor, is_noisy: Tensor, process: NoiseProcess) -> Tensor | None:
    """Places of the tokens that can have a loss, in the flattened axes of `noised`; None for all.

    Only noisy tokens do, and under masked noise only masks: any other has weight 0. To be asked of tensors on the CPU,
    since their number has to be known to the host.
    """
    if process.is_masked_limit:
        is_noisy = is_noisy & (noised == process.mask_id)
    return None if bool(is_noisy.all()) else is_noisy.reshape(-1).nonzero().squeeze(-1)
