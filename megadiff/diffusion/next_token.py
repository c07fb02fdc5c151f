"""Sequences for next-token prediction, the autoregressive control: the same tokens, seen from the left.

A sequence x_1 .. x_L is read as start, x_1 .. x_{L-1} and predicts x_1 .. x_L, so exactly the L tokens a diffusion
model is measured on are measured, and bits per byte compare.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from megadiff.diffusion.noising import NoisedBatch, isotropic_batch
from megadiff.diffusion.shapes import Bool, Int, Integer


@runtime_checkable
class SpecialIds(Protocol):
    """A tokenizer, as far as a sequence's start goes."""

    bos_id: int | None
    eos_id: int | None
    mask_id: int


def start_id(tokenizer: SpecialIds) -> int:
    """Return the token before a sequence: bos, else eos, else the mask, which no text contains."""
    return next(i for i in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) if i is not None)


def next_token_batch(
    clean: Integer[npt.NDArray[np.integer], "B L"],
    *,
    start_id: int,
    predicted: Bool[npt.NDArray[np.bool_], "B L"] | None = None,
    documents: Int[npt.NDArray[np.int64], "B L"] | None = None,
) -> NoisedBatch:
    """Shift sequences right behind `start_id`; no noise, and the whole sequence is a causal prompt.

    Where sequences consist of documents, each of them is shifted behind a `start_id` of its own.

    Args:
        clean: the ids.
        start_id: what stands before a sequence (bos, or another special token).
        predicted: targets that count; None for all.
        documents: number of the document of each target; None if every sequence is one document.

    Returns:
        `noised` is the input, `clean` the targets; `is_noisy` marks those that count, `log_snr` is 0 and without
        meaning.
    """
    targets = torch.from_numpy(np.asarray(clean).astype(np.int64))
    count, length = targets.shape
    inputs = torch.cat([torch.full((count, 1), start_id), targets[:, :-1]], dim=1)
    numbers = None if documents is None else torch.from_numpy(documents)
    if numbers is not None:
        inputs[:, 1:].masked_fill_(numbers.diff(dim=1) != 0, start_id)
    batch = isotropic_batch(inputs, targets, log_snr=np.zeros(count))
    counted = batch.is_noisy if predicted is None else torch.from_numpy(predicted)
    return batch._replace(prompt_length=torch.full((count,), length), is_noisy=counted, documents=numbers)
