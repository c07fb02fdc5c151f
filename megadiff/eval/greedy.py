"""Test for greedy completions: those that a model generates by always taking the most probable token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from megadiff.diffusion.next_token import next_token_batch, start_id
from megadiff.eval.likelihood import Item
from megadiff.eval.texts_likelihood import Measured
from megadiff.sampling.standalone import Settings, generate

T = TypeVar("T")


class Sampled(Measured, Protocol):
    """A model that can be evaluated and, if it is a diffusion model, sampled; such as `load_model.InferenceModel`."""

    def denoise(self, ids: Tensor, prompt_length: int = 0) -> Tensor:
        """Map ids [B, L], whose first `prompt_length` tokens are clean, to logits [B, L, V]."""
        ...


def greedy(
    model: Sampled, items: Sequence[Item], *, batch_size: int = 32, seed: int = 0, progress: Callable[[int], None]
) -> list[bool]:
    """Return whether each completion is the greedy one, in order; an empty completion is greedy.

    For an autoregressive model, every token must be the most probable one after its predecessors. For a diffusion
    model, the completion must equal the output of the adaptive sampler after the prompt, at temperature 0 with one
    token per step, for as many positions of noise as the completion has tokens; that noise is keyed by (seed, the
    prompt), so at most one completion of each length is greedy.
    """
    found = [not item.completion for item in items]
    judge = _next_tokens_agree if model.is_autoregressive else _writes_the_same
    open_items = (i for i, item in enumerate(items) if item.completion)
    for taken in batches(open_items, lambda i: (len(items[i].prompt), len(items[i].completion)), batch_size):
        for i, answer in zip(taken, judge(model, [items[i] for i in taken], seed), strict=True):
            found[i] = answer
        progress(len(taken))
    return found


def batches(members: Iterable[T], key: Callable[[T], tuple[int, ...]], count: int) -> Iterator[list[T]]:
    """Yield members with equal keys together, at most `count` at a time, in the order of the keys."""
    waiting: list[T] = []
    for member in sorted(members, key=key):
        if waiting and (len(waiting) == count or key(waiting[0]) != key(member)):
            yield waiting
            waiting = []
        waiting.append(member)
    if waiting:
        yield waiting


def _writes_the_same(model: Sampled, items: Sequence[Item], seed: int) -> list[bool]:
    length = len(items[0].completion)
    low, high = model.process.sampling_range
    settings = Settings(
        max_new_tokens=length,
        max_denoising_steps=length,
        sampler="adaptive",
        tokens_per_step=1,
        temperature=0.0,
        min_log_snr=low,
        max_log_snr=high,
    )
    prompts = torch.tensor([item.prompt for item in items], dtype=torch.int64).reshape(len(items), -1)
    seeds = [seed_of(seed, Item(item.prompt, ())) for item in items]
    written = generate(model.denoise, prompts.to(model.platform.device), settings, model.process, seed=seeds).sequences
    return [tuple(sequence) == item.ids for sequence, item in zip(written.tolist(), items, strict=True)]


def seed_of(seed: int, item: Item) -> int:
    """Return a number unique to this pair."""
    return (seed << 63) + item.key


def _next_tokens_agree(model: Sampled, items: Sequence[Item], seed: int) -> list[bool]:
    del seed  # nothing is random
    clean = np.array([item.ids for item in items], dtype=np.int64)
    sequences = next_token_batch(clean, start_id=start_id(model.tokenizer))
    logits = model.logits(sequences.noised.to(model.platform.device), sequences.prompt_length)
    logits = logits[:, len(items[0].prompt) :, : model.process.vocab_size].float()
    logits[..., model.process.mask_id] = -torch.inf
    agrees = logits.argmax(dim=-1).cpu() == sequences.clean[:, len(items[0].prompt) :]
    return agrees.all(dim=1).tolist()
