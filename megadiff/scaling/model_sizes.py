"""Shapes that a model of a given size can have: the paper's block, with its heads and ratios of width to depth.

The paper's models have 64 features of width for each layer up to width 1024, and 77 to 171 beyond. The usual ratio here
is 64, growing with the root of the width from 1024 on; a shape has that within a factor of 1.6. Widths below 64, for
studies on a CPU, have one layer and one head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megadiff.scaling.flops import FlopCount, flops_per_token, paper_params

_SPREAD = 1.6
"""Largest factor between a shape's ratio of width to depth and the usual one."""
_WIDTHS = (
    *range(16, 64, 8),
    *range(64, 1024, 64),
    *range(1024, 2048, 128),
    *range(2048, 8192, 256),
    *range(8192, 32769, 512),
)


@dataclass(frozen=True)
class ModelSize:
    """Depth and width of a model, with heads of 64 features up to width 1024 and of 128 beyond.

    A width that is no multiple of these has the largest number of heads that are not narrower, all of an even width.
    """

    layers: int
    hidden: int

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        head_dim = 128 if self.hidden > 1024 and self.hidden % 128 == 0 else 64
        most = max(1, self.hidden // head_dim)
        return next((heads for heads in range(most, 0, -1) if self.hidden % (2 * heads) == 0), 1)

    @property
    def params(self) -> int:
        """Number of parameters without embedding and head, as the paper counts them."""
        return paper_params(self.layers, self.hidden)

    @property
    def name(self) -> str:
        """Short name, as in L20-D1536."""
        return f"L{self.layers}-D{self.hidden}"

    @property
    def oddness(self) -> float:
        """Distance from the usual ratio of width to depth, at most 1, and a little more for an odd number of layers."""
        apart = abs(math.log(self.hidden / self.layers / usual_ratio(self.hidden))) / math.log(_SPREAD)
        return apart + (0.1 if self.layers % 2 else 0.0)

    def flops_per_token(self, count: FlopCount, *, seq_length: int, vocab_size: int) -> float:
        """Return the training FLOPs of a token."""
        return flops_per_token(self.layers, self.hidden, seq_length, method=count, vocab_size=vocab_size)


def usual_ratio(hidden: int) -> float:
    """Return the usual ratio of width to depth."""
    return 64 * math.sqrt(max(1.0, hidden / 1024))


def model_sizes() -> Iterator[ModelSize]:
    """Yield all shapes, narrow ones first."""
    for hidden in _WIDTHS:
        usual = hidden / usual_ratio(hidden)
        for layers in range(max(1, math.ceil(usual / _SPREAD)), max(2, math.floor(usual * _SPREAD) + 1)):
            yield ModelSize(layers, hidden)
