"""Which implementation of the head a run takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from megadiff.kernels.fused_head import fused_objective
from megadiff.kernels.head import HeadLoss
from megadiff.kernels.plain_head import plain_objective

HeadName = Literal["auto", "plain", "chunked"]
Head = Callable[..., HeadLoss]
"""(hidden, weight, tokens, formula, *, shard) -> the answer; see `fused_head.fused_objective`."""


def choose_head(wanted: HeadName) -> tuple[str, Head]:
    """The implementation's name, for the log, and the implementation; auto takes chunked."""
    name = "chunked" if wanted == "auto" else wanted
    return name, {"plain": plain_objective, "chunked": fused_objective}[name]
