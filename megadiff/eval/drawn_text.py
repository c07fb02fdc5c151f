"""Text samples drawn during training, from which a person can see the model learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megadiff.data.tokenizers import Tokenizer
from megadiff.parallel.attention_pattern import AttentionPattern
from megadiff.parallel.pipeline import DistributedForward, ModelChunk
from megadiff.parallel.topology import Topology
from megadiff.sampling.sampler import Sampler
from megadiff.sampling.trace import printable

SEED = 0
"""Seed of the samples, not the run's: the same noise at every step and in every run, so that only the model differs."""


class DrawnText:
    """Whole sequences of new text by the ancestral sampler, temperature 1, without a prompt.

    Args:
        sampler: the sampler of the run's training method.
        attention: the attention after a clean prompt (`Method.prompted_attention`).
        start: tokens that each sequence begins with (bos, if the training data have it).
        sequences, steps: number of sequences, and number of denoising steps.
        chunks: this rank's model chunks.
    """

    def __init__(
        self,
        *,
        sequences: int,
        steps: int,
        seq_length: int,
        sampler: Sampler,
        attention: Callable[[Tensor, int], AttentionPattern],
        tokenizer: Tokenizer,
        start: Sequence[int] = (),
        chunks: Sequence[ModelChunk],
        topology: Topology,
        device: torch.device,
    ) -> None:
        self._sequences, self._sampler, self._tokenizer, self._device = sequences, sampler, tokenizer, device
        self._model = DistributedForward(
            chunks,
            topology=topology,
            device=device,
            shape=(sequences, seq_length),
            attention=attention,
            vocab_size=sampler.process.vocab_size,
        )
        self._start = list(start)
        self._settings = sampler.settings(seq_length - len(self._start), max_denoising_steps=steps)

    def __call__(self) -> str:
        """Draw the samples. Collective over the world; every rank returns the text, sequences numbered."""
        ids = self._model.run(self._drawn)
        texts = [printable(self._tokenizer.decode(sequence)) for sequence in ids.tolist()]
        return "\n\n".join(f"[{number}] {text}" for number, text in enumerate(texts, start=1)) + "\n"

    def _drawn(self, denoise: Any) -> Tensor:
        prompt = torch.tensor([self._start] * self._sequences, dtype=torch.int64, device=self._device)
        prompt = prompt.reshape(self._sequences, len(self._start))
        return self._sampler.generate(denoise, prompt, self._settings, seed=SEED).sequences.cpu()
