"""The columns of the vocabulary that this rank holds, and reductions of per-token sums over all columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megadiff.diffusion.noise_process import NoiseProcess


@dataclass(frozen=True)
class VocabShard:
    """Columns [start, start + width) of a vocabulary whose first `vocab_size` ids are real, mask included."""

    start: int
    """Global id of the first column."""
    width: int
    """Number of columns here; those from the vocabulary's end on are padding."""
    vocab_size: int
    mask_id: int
    group: torch.distributed.ProcessGroup | None = None
    """The ranks that share the vocabulary; None if this rank holds all of it."""

    @classmethod
    def of(
        cls,
        weight: Tensor,
        process: NoiseProcess,
        *,
        start: int = 0,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> VocabShard:
        """Return the shard of a head weight [V / tp, d]; a group of one rank communicates nothing."""
        if group is not None and torch.distributed.get_world_size(group) == 1:
            group = None
        return cls(start, weight.shape[0], process.vocab_size, process.mask_id, group)

    @property
    def num_valid(self) -> int:
        """Number of columns here that are vocabulary rather than padding."""
        return max(0, min(self.width, self.vocab_size - self.start))

    @property
    def mask_column(self) -> int | None:
        """Local column of the mask; None if another rank holds it."""
        column = self.mask_id - self.start
        return column if 0 <= column < self.num_valid else None

    def local_index(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (column [n, 1], here [n, 1]): each id's local column, and whether it is here and not the mask.

        A column is in range even if the id is not here.
        """
        column = (ids - self.start).unsqueeze(-1)
        here = (column >= 0) & (column < self.num_valid) & (ids != self.mask_id).unsqueeze(-1)
        return column.clamp(0, max(0, self.num_valid - 1)), here

    def mask_invalid(self, logits: Tensor) -> None:
        """Set the mask's column and the padding of [n, width] to -inf, in place."""
        logits[:, self.num_valid :] = -torch.inf
        if self.mask_column is not None:
            logits[:, self.mask_column] = -torch.inf

    def reduce(self, *values: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> tuple[Tensor, ...]:
        """Combine per-token values over the group, in one collective."""
        if self.group is None:
            return values
        packed = torch.stack(values)
        torch.distributed.all_reduce(packed, op=op, group=self.group)
        return packed.unbind(0)
