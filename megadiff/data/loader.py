"""This data-parallel rank's microbatches, prepared one step ahead in a thread.

The global batch of a step is the samples first .. first + global_sequences - 1. Microbatch m of rank r takes the
`micro_sequences` samples from first + (m * dp_size + r) * micro_sequences on: which samples make up a step depends on
neither `dp_size` nor `micro_sequences`. The whole resumable state is one number, the samples seen so far.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from megadiff.data.rows import TrainingRows
from megadiff.errors import ConfigError

T = TypeVar("T")

_STOP_CHECK_S = 0.1


def microbatch_samples(
    step_first_sample: int, *, micro_sequences: int, dp_rank: int, dp_size: int, microbatch: int
) -> list[int]:
    """Global sample indices of one microbatch of one data-parallel rank: [micro_sequences]."""
    first = step_first_sample + (microbatch * dp_size + dp_rank) * micro_sequences
    return list(range(first, first + micro_sequences))


def num_microbatches(global_sequences: int, *, micro_sequences: int, dp_size: int) -> int:
    """Microbatches that each rank does in a step.

    Raises:
        ConfigError: the global batch is no multiple of `micro_sequences * dp_size`.
    """
    together = micro_sequences * dp_size
    if global_sequences % together:
        below = global_sequences // together * together
        near = f"{below} or {below + together}" if below else f"{together}"
        raise ConfigError(
            f"batch.global_sequences must be a multiple of batch.micro_sequences x data-parallel ranks = "
            f"{micro_sequences} x {dp_size}, found {global_sequences}; use {near}, or change batch.micro_sequences"
        )
    return global_sequences // together


class Microbatch(NamedTuple, Generic[T]):
    """What one forward-backward works on."""

    samples: list[int]
    """Global sample indices, [b]."""

    content: T
    """Clean rows [b, L] int64, or what the row transform made of them."""


class RowLoader(Generic[T]):
    """An endless iterator of this rank's microbatches, `microbatches_per_step` of them a step.

    Rows are read and transformed by one background thread; an error there is raised by the `next` that would have
    given its microbatch. Close it (or use it in a `with`) to end the thread.

    Args:
        rows: the run's rows by global sample index.
        row_transform: clean rows [b, L] and their samples to content; a pure function of them. `clean_rows` keeps them.
        first_sample: samples seen before; a multiple of what a step takes as long as the batch did not change.
        prefetch: microbatches kept ready.

    Raises:
        ConfigError: the batch does not divide over the ranks.
    """

    def __init__(
        self,
        rows: TrainingRows,
        row_transform: Callable[[np.ndarray, list[int]], T],
        *,
        batch: GlobalBatch,
        first_sample: int = 0,
        prefetch: int = 2,
    ) -> None:
        self.microbatches_per_step = num_microbatches(
            batch.global_sequences, micro_sequences=batch.micro_sequences, dp_size=batch.dp_size
        )
        self._batch = batch
        self._first_sample = first_sample
        self._taken = 0
        self._failure: BaseException | None = None
        self._ready: queue.Queue[Microbatch[T] | _Failed] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        order = _sample_order(batch, first_sample, self.microbatches_per_step)
        # The thread must not hold the loader itself, or one dropped without `close` would never end it.
        arguments = (rows, row_transform, order, self._ready, self._stop)
        self._thread = threading.Thread(target=_prefetch, args=arguments, name="megadiff-row-loader", daemon=True)
        self._finalizer = weakref.finalize(self, self._stop.set)
        self._thread.start()

    @property
    def samples_seen(self) -> int:
        """Samples of all ranks in the steps whose microbatches have all been taken: what a checkpoint must keep."""
        steps = self._taken // self.microbatches_per_step
        return self._first_sample + steps * self._batch.global_sequences

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
        self._taken += 1
        return found

    def close(self) -> None:
        """End the thread and drop what it has prepared; may be called twice."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> RowLoader[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class GlobalBatch(NamedTuple):
    """How the sequences of a step are dealt out, and which share is this rank's."""

    global_sequences: int
    """Sequences of a step over all ranks."""

    micro_sequences: int
    """Sequences of one microbatch of one rank."""

    dp_rank: int = 0
    """This rank's place among the data-parallel ranks."""

    dp_size: int = 1
    """Data-parallel ranks."""


def clean_rows(clean: np.ndarray, samples: list[int]) -> np.ndarray:
    """The row transform that changes nothing."""
    del samples
    return clean


class _Failed(NamedTuple):
    error: BaseException


def _sample_order(batch: GlobalBatch, first_sample: int, microbatches_per_step: int) -> Iterator[list[int]]:
    while True:
        for microbatch in range(microbatches_per_step):
            yield microbatch_samples(
                first_sample,
                micro_sequences=batch.micro_sequences,
                dp_rank=batch.dp_rank,
                dp_size=batch.dp_size,
                microbatch=microbatch,
            )
        first_sample += batch.global_sequences


def _prefetch(
    rows: TrainingRows,
    row_transform: Callable[[np.ndarray, list[int]], T],
    order: Iterator[list[int]],
    ready: queue.Queue[Microbatch[T] | _Failed],
    stop: threading.Event,
) -> None:
    for samples in order:
        try:
            made = Microbatch(samples, row_transform(rows.rows(samples), samples))
        except BaseException as error:  # whatever it is, it belongs to the thread that asked for the rows
            made = _Failed(error)
        while not stop.is_set():
            try:
                ready.put(made, timeout=_STOP_CHECK_S)
                break
            except queue.Full:
                continue
        if stop.is_set() or isinstance(made, _Failed):
            return
