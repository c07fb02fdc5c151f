"""Rotary frequencies changed for longer sequences than those of the first training.

A model with `linear`, `llama3` or `yarn` scaling has other frequencies than base^(-2 i / D), and with `yarn` rotated
queries and keys that are longer by a factor. This file is copied beside an exported model, so it imports nothing of
this project.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled_frequencies(
    frequencies: Tensor,
    base: float,
    *,
    type: str,
    factor: float,
    original_seq_length: int | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    attention_factor: float | None = None,
) -> Tensor:
    """Return rotary frequencies after scaling.

    Args:
        frequencies: [D / 2] float32, base^(-2 i / D) in radians per position.
        base: base of the frequencies.
        type: `linear`, `llama3` or `yarn`; this and what follows as in `model.config.RopeScaling`.
        attention_factor: has no effect here (`attention_factor_of`).

    Source: `linear`, Chen et al., arXiv:2306.15595; `yarn`, Peng et al., arXiv:2309.00071, section 3.2; `llama3`,
    `_compute_llama3_parameters` of transformers' modeling_rope_utils.py.
    """
    del attention_factor
    slow = frequencies / factor
    if type == "linear":
        return slow
    assert original_seq_length is not None
    if type == "llama3":
        turns = original_seq_length * frequencies / (2 * math.pi)
        kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    else:
        first, last = (_index(turns, len(frequencies), base, original_seq_length) for turns in (beta_fast, beta_slow))
        if truncate:
            first, last = math.floor(first), math.ceil(last)
        kept = 1 - _ramp(len(frequencies), first, last).to(frequencies)
    return slow * (1 - kept) + frequencies * kept


def attention_factor_of(*, type: str, factor: float, attention_factor: float | None = None, **_: object) -> float:
    """Return the factor on rotated queries and on rotated keys; 1 but for `yarn`."""
    if type != "yarn":
        return 1.0
    return 0.1 * math.log(factor) + 1.0 if attention_factor is None else attention_factor


def _index(turns: float, count: int, base: float, length: int) -> float:
    """Return the place among `count` frequencies, as a real number, of the one that turns this often over `length`."""
    return count * math.log(length / (turns * 2 * math.pi)) / math.log(base)


def _ramp(count: int, first: float, last: float) -> Tensor:
    """Return [count] numbers that rise from 0 at index `first` to 1 at index `last`."""
    first, last = max(first, 0), min(last, 2 * count - 1)
    width = last - first if last != first else 0.001  # as transformers has it: a step instead of a division by zero
    return ((torch.arange(count, dtype=torch.float32) - first) / width).clamp(0, 1)
