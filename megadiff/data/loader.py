"""Loader of this data-parallel rank's microbatches, prepared one step ahead in a thread.

The global batch of a step is the samples first .. first + sequences - 1 (`BatchSizes`). Microbatch m of rank r takes
the `micro_batch_size` samples from first + (m * dp_size + r) * micro_batch_size on: the set of samples in a step
depends on neither `dp_size` nor `micro_batch_size`. The only resumable state is the number of steps taken so far.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from types import TracebackType
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from megadiff.data.config import BatchSizes, StepBatch

T = TypeVar("T")

SequenceTransform = Callable[..., T]
"""Transform of (clean sequences [b, L], their global sample indices, the global batch they belong to) to content; it
takes which of their tokens are to be predicted, [b, L], as a fourth argument where some are not, and then the document
of each token, [b, L], where sequences hold several."""

PredictedTokens = Callable[[Sequence[int]], "np.ndarray | None"]
"""Function from samples to the tokens of their sequences that are to be predicted, [b, L]; None for all."""

DocumentsOfTokens = Callable[[Sequence[int]], "np.ndarray | None"]
"""Function from samples to the document of each token of their sequences, [b, L]; None if every sequence is one."""

_STOP_CHECK_S = 0.1


class SequencesBySample(Protocol):
    """The sequences of a run by global sample index."""

    def sequences(self, samples: Sequence[int]) -> np.ndarray:
        """Return the sequences of these samples, in their order: [B, L] int64."""
        ...


def microbatch_samples(
    step_first_sample: int, *, micro_batch_size: int, dp_rank: int, dp_size: int, microbatch: int
) -> list[int]:
    """Return the global sample indices of one microbatch of one data-parallel rank: [micro_batch_size]."""
    first = step_first_sample + (microbatch * dp_size + dp_rank) * micro_batch_size
    return list(range(first, first + micro_batch_size))


class DataShard(NamedTuple):
    """The part of each step's sequences that this rank gets."""

    micro_batch_size: int
    """Number of sequences in one microbatch of one rank."""

    dp_rank: int = 0
    """Index of this rank among the data-parallel ranks."""

    dp_size: int = 1
    """Number of data-parallel ranks."""


class Microbatch(NamedTuple, Generic[T]):
    """Input of one forward-backward pass."""

    batch: StepBatch
    """The global batch that it belongs to."""

    samples: list[int]
    """Global sample indices, [b]."""

    content: T
    """Clean sequences [b, L] int64, or the output of the sequence transform."""


class SequenceLoader(Generic[T]):
    """An endless iterator of this rank's microbatches, `microbatches_in(step)` of them for each step.

    Sequences are read and transformed by one background thread; an error there is raised by the `next` that would have
    returned its microbatch. Close the loader (or use it in a `with`) to end the thread.

    Args:
        sequences: the run's sequences by global sample index.
        sequence_transform: maps clean sequences [b, L], their samples and the global batch of these to content; a pure
            function. `clean_sequences` returns the sequences unchanged.
        sizes: number of sequences in every step.
        shard: this rank's part of each.
        first_step: number of steps taken before.
        predicted: function from samples to the tokens of their sequences that are to be predicted, [b, L] or None for
            all, which the transform is then given as well; None where no sequence has others.
        documents: function from samples to the document of each of their tokens, [b, L] or None, likewise; it gives
            documents only for samples of which `predicted` gives tokens.
        prefetch: number of microbatches kept ready; by default those of a step (of the largest, and at least two),
            since a step takes all of its own at once.

    Raises:
        ConfigError: some step's sequences do not divide over the ranks.
    """

    def __init__(
        self,
        sequences: SequencesBySample,
        sequence_transform: SequenceTransform[T],
        *,
        sizes: BatchSizes,
        shard: DataShard,
        first_step: int = 0,
        predicted: PredictedTokens | None = None,
        documents: DocumentsOfTokens | None = None,
        prefetch: int | None = None,
    ) -> None:
        sizes.check(micro_batch_size=shard.micro_batch_size, dp_size=shard.dp_size)
        self._sizes, self._shard = sizes, shard
        self._steps_taken, self._left_in_step = first_step, self.microbatches_in(first_step)
        if prefetch is None:
            prefetch = max(2, sizes.global_batch_size // (shard.micro_batch_size * shard.dp_size))
        self._failure: BaseException | None = None
        self._ready: queue.Queue[Microbatch[T] | _Failed] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        order = _sample_order(sizes, shard, first_step)
        # The thread must not reference the loader, or a loader dropped without `close` would never end it.
        source = _Sequences(sequences, [more for more in (predicted, documents) if more], sequence_transform)
        arguments = (source, order, self._ready, self._stop)
        self._thread = threading.Thread(target=_prefetch, args=arguments, name="megadiff-sequence-loader", daemon=True)
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread.start()

    def microbatches_in(self, step: int) -> int:
        """Return the number of this rank's microbatches in a step."""
        shard = self._shard
        return self._sizes.num_microbatches(step, micro_batch_size=shard.micro_batch_size, dp_size=shard.dp_size)

    @property
    def steps_taken(self) -> int:
        """Number of steps whose microbatches have all been taken, earlier runs' included; the state to save."""
        return self._steps_taken

    @property
    def samples_seen(self) -> int:
        """Number of samples over all ranks in those steps."""
        return self._sizes.samples_before(self._steps_taken)

    def __iter__(self) -> Iterator[Microbatch[T]]:
        return self

    def __next__(self) -> Microbatch[T]:
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise ValueError("the loader is closed")
        found = self._ready.get()
        if isinstance(found, _Failed):
            self._failure = found.error
            raise found.error
        self._left_in_step -= 1
        if self._left_in_step == 0:
            self._steps_taken += 1
            self._left_in_step = self.microbatches_in(self._steps_taken)
        return found

    def close(self) -> None:
        """End the thread and discard the prepared microbatches; may be called twice."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> SequenceLoader[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def clean_sequences(clean: np.ndarray, samples: list[int], batch: StepBatch) -> np.ndarray:
    """Return the sequences unchanged."""
    del samples, batch
    return clean


class _Failed(NamedTuple):
    error: BaseException


def _sample_order(sizes: BatchSizes, shard: DataShard, step: int) -> Iterator[tuple[StepBatch, list[int]]]:
    """Yield the global batch and the samples of each of this rank's microbatches, from `step` on."""
    micro, rank, ranks = shard
    while True:
        batch = sizes.batch_of(step)
        for microbatch in range(sizes.num_microbatches(step, micro_batch_size=micro, dp_size=ranks)):
            yield (
                batch,
                microbatch_samples(
                    batch.first_sample, micro_batch_size=micro, dp_rank=rank, dp_size=ranks, microbatch=microbatch
                ),
            )
        step += 1


class _Sequences(NamedTuple, Generic[T]):
    """The sequences of a run with their transform."""

    clean: SequencesBySample
    facts: Sequence[Callable[[Sequence[int]], np.ndarray | None]]
    """Functions that give the transform's further arguments; what follows the first None is left out."""
    transform: Callable[..., T]

    def of(self, samples: list[int], batch: StepBatch) -> Microbatch[T]:
        """Return the microbatch of some samples."""
        more = takewhile(lambda found: found is not None, (fact(samples) for fact in self.facts))
        return Microbatch(batch, samples, self.transform(self.clean.sequences(samples), samples, batch, *more))


def _prefetch(
    sequences: _Sequences[T],
    order: Iterator[tuple[StepBatch, list[int]]],
    ready: queue.Queue[Microbatch[T] | _Failed],
    stop: threading.Event,
) -> None:
    for batch, samples in order:
        try:
            made = sequences.of(samples, batch)
        except BaseException as error:  # any exception is raised again in the thread that consumes the sequences
            made = _Failed(error)
        while not stop.is_set():
            try:
                ready.put(made, timeout=_STOP_CHECK_S)
                break
            except queue.Full:
                continue
        if stop.is_set() or isinstance(made, _Failed):
            return
