"""Gradients of chosen sequences, for measurements between steps that leave the run as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megadiff.data.config import StepBatch
from megadiff.data.sequences import joined_documents, joined_masks
from megadiff.diffusion.noising import NoisedBatch
from megadiff.model.denoiser import gathered_weights
from megadiff.parallel.objective import DeviceBatch, ShardedObjective
from megadiff.parallel.pipeline import DataParallelChunk, Loss, run_microbatches, unreduced
from megadiff.parallel.topology import Topology

Source = Literal["train", "validation"]
"""Kind of data that sequences are taken from."""

_FIRST_DRAW = 2**48
"""Sample index from which the noise of measurements is counted; a run ends far below it, so none is shared."""


class ValidationSource(Protocol):
    """Validation sequences of one source."""

    def __len__(self) -> int: ...

    def sequences(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return clean sequences [B, L]."""
        ...

    def predicted(self, indices: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        """Return which of their tokens are to be predicted, [B, L]; None for all."""
        ...

    def documents(self, indices: Sequence[int]) -> npt.NDArray[np.int64] | None:
        """Return the documents of their tokens, [B, L]; None if every sequence is one document."""
        ...


class TrainingSource(Protocol):
    """Sequences of the run by sample index."""

    def sequences(self, samples: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return clean sequences [B, L]."""
        ...

    def predicted(self, samples: Sequence[int]) -> npt.NDArray[np.bool_] | None:
        """Return which of their tokens are to be predicted, [B, L]; None for all."""
        ...

    def documents(self, samples: Sequence[int]) -> npt.NDArray[np.int64] | None:
        """Return the documents of their tokens, [B, L]; None if every sequence is one document."""
        ...


@dataclass(frozen=True)
class SequenceGradients:
    """Gradients of the run's own loss on sequences that a measurement chooses.

    Each data-parallel replica computes those of its own microbatches; nothing is summed over replicas.
    """

    chunks: Sequence[DataParallelChunk]
    """Data-parallel wrapped model chunks of this rank."""
    objective: ShardedObjective
    batch: Callable[..., NoisedBatch]
    """The training method's `batch`."""
    train: TrainingSource
    """Sequences of the run by sample index."""
    validation: Sequence[ValidationSource]
    """Validation data of the run; empty if there are none."""
    topology: Topology
    device: torch.device
    seq_length: int
    micro_batch_size: int

    def clean(self, source: Source, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return clean sequences [count, L]: of the run from a sample on, or of the validation data in a circle."""
        if source == "train":
            return self.train.sequences(list(range(first, first + count)))
        return np.concatenate([kind.sequences([index]) for kind, index in self._chosen(first, count)])

    def predicted(self, source: Source, first: int, count: int) -> npt.NDArray[np.bool_] | None:
        """Return which tokens of the sequences of `clean` are to be predicted, [count, L]; None for all."""
        if source == "train":
            return self.train.predicted(list(range(first, first + count)))
        return joined_masks([kind.predicted([index]) for kind, index in self._chosen(first, count)], self.seq_length)

    def documents(self, source: Source, first: int, count: int) -> npt.NDArray[np.int64] | None:
        """Return the documents of the tokens of `clean`, [count, L]; None if every sequence is one document."""
        if source == "train":
            return self.train.documents(list(range(first, first + count)))
        return joined_documents(
            [kind.documents([index]) for kind, index in self._chosen(first, count)], self.seq_length
        )

    def _chosen(self, first: int, count: int) -> list[tuple[ValidationSource, int]]:
        places = [(kind, index) for kind in self.validation for index in range(len(kind))]
        return [places[(first + index) % len(places)] for index in range(count)]

    def noised(
        self,
        clean: npt.NDArray[np.int64],
        first_draw: int,
        predicted: npt.NDArray[np.bool_] | None = None,
        documents: npt.NDArray[np.int64] | None = None,
        *,
        step: int = 0,
    ) -> NoisedBatch:
        """Return the sequences as the training method makes them, each with a draw of its own.

        Args:
            clean: [B, L].
            first_draw: number of the first sequence's draw; equal numbers give equal noise. Levels are not stratified
                over the sequences, so that draws are independent.
            predicted: tokens that are to be predicted, [B, L]; None for all.
            documents: documents of the tokens, [B, L]; None if every sequence is one document.
            step: number of steps taken, by which some methods change (`method.anneal_steps`).
        """
        index = [_FIRST_DRAW + first_draw + place for place in range(len(clean))]
        more = [facts for facts in (predicted, documents) if facts is not None]
        return self.batch(clean, index, StepBatch(step=step, first_sample=0, sequences=1), *more)

    @contextmanager
    def borrowed(self) -> Iterator[Callable[[NoisedBatch], list[Tensor]]]:
        """Yield a function from a microbatch to the gradient of its summed loss, and restore the run's gradients.

        The function is collective over the ranks that hold one replica, and entering and leaving over the world. It
        returns this rank's part of the gradient, valid until its next call; every entry of the model's gradient is on
        one rank of the replica alone. The run's gradients wait in the host's memory meanwhile.
        """
        buffers: list[Any] = []
        for chunk in self.chunks:
            buffers += cast(Any, chunk).buffers + chunk.expert_parallel_buffers  # lists, where torch has a method
        kept = [buffer.grad_data.to("cpu", copy=True) for buffer in buffers]
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        aliases = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None  # after an update it may be the buffer itself, which a backward pass would add twice
        try:
            with gathered_weights(self.chunks):
                yield self._gradient
        finally:
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            for buffer, content in zip(buffers, kept, strict=True):
                buffer.grad_data.copy_(content)
            for parameter, alias in zip(parameters, aliases, strict=True):
                parameter.grad = alias

    def _gradient(self, microbatch: NoisedBatch) -> list[Tensor]:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        layout = self.topology.layout
        # The interleaved schedule needs a multiple of the stages: the others count with weight 0.
        repeats = layout.pipeline if layout.virtual_pipeline > 1 else 1
        placed = self.objective.place(microbatch, self.device)
        with unreduced(self.chunks):
            run_microbatches(
                self.chunks,
                [(placed, float(place == 0)) for place in range(repeats)],
                forward=lambda chunk, item: self.objective.forward(chunk, item[0]),
                loss=self._weighted_loss,
                seq_length=self.seq_length,
                micro_batch_size=self.micro_batch_size,
            )
        return [
            parameter.main_grad  # type: ignore[attr-defined]
            for chunk in self.chunks
            for parameter in chunk.parameters()
            if (self.topology.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False))
            and not getattr(parameter, "shared", False)  # a tied head on another stage than the embedding
        ]

    def _weighted_loss(self, output: object, item: tuple[DeviceBatch, float]) -> Loss:
        loss, tokens, _ = self.objective.report(output, item[0])  # type: ignore[arg-type]
        return loss * item[1], tokens, None
