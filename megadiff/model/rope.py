"""Rotary frequencies changed for longer sequences than those of the first training.

A model with `linear`, `llama3` or `yarn` scaling has other frequencies than base^(-2 i / D), and with `yarn` rotated
queries and keys that are longer by a factor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megadiff.model.config import RopeScaling


def scaled_frequencies(frequencies: Tensor, base: float, scaling: RopeScaling) -> Tensor:
    """Return rotary frequencies after scaling.

    Args:
        frequencies: [D / 2] float32, base^(-2 i / D) in radians per position.
        base: base of the frequencies.
        scaling: what to change.

    Source: `linear`, Chen et al., arXiv:2306.15595; `yarn`, Peng et al., arXiv:2309.00071, section 3.2 ("NTK-by-parts");
    `llama3`, as `_compute_llama3_parameters` of transformers' modeling_rope_utils.py.
    """
    slow = frequencies / scaling.factor
    if scaling.type == "linear":
        return slow
    length = scaling.original_seq_length
    assert length is not None
    if scaling.type == "llama3":
        turns = length * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        kept = 1 - _ramp(len(frequencies), base, length, scaling).to(frequencies)
    return slow * (1 - kept) + frequencies * kept


def attention_factor(scaling: RopeScaling | None) -> float:
    """Return the factor on rotated queries and on rotated keys; 1 but for `yarn`."""
    if scaling is None or scaling.type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


def _ramp(count: int, base: float, length: int, scaling: RopeScaling) -> Tensor:
    """Return [count] numbers that rise from 0 at the frequency of `beta_fast` turns to 1 at that of `beta_slow`."""

    def index(turns: float) -> float:
        return count * math.log(length / (turns * 2 * math.pi)) / math.log(base)

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    width = last - first if last != first else 0.001  # as transformers has it: a step instead of a division by zero
    return ((torch.arange(count, dtype=torch.float32) - first) / width).clamp(0, 1)
