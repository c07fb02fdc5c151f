"""Shards made by several processes of one machine. Other machines may work on the same folder at the same time."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from megadiff.data.documents import Corpus
from megadiff.data.preprocess import DocumentMarkers, ProgressReport, refuse_framing, speed_note
from megadiff.data.shards.ledger import Ledger
from megadiff.data.shards.plan import UNIT_BYTES, ShardPlan, make_plan
from megadiff.data.shards.work import Worker
from megadiff.data.tokenizer_files import load_for_batches
from megadiff.data.worker_processes import CONTEXT, begin_worker, interrupts_held_back
from megadiff.errors import DataError, MegadiffError

_SHOW_EVERY_S = 1.0
_MOST_DEATHS = 3


@dataclass(frozen=True)
class _Refused:
    """The sentence with which a worker ended."""

    message: str


@dataclass(frozen=True)
class _Failed:
    """The stack trace of a bug in a worker."""

    trace: str


def make_shards(
    corpus: Corpus,
    folder: str | Path,
    tokenizer_path: str | Path,
    *,
    framing: DocumentMarkers | None = None,
    workers: int = 1,
    backend: str = "tokenizers",
    unit_bytes: int = UNIT_BYTES,
    drop_duplicates: bool = False,
) -> int:
    """Tokenize a corpus into a folder of shards, or continue one, until every shard is there.

    Any number of these calls, on any machines that share the folder, divide the work.

    Args:
        corpus: the text; `max_bad_lines` holds for all units together.
        folder: the folder of shards.
        tokenizer_path: as for `load_tokenizer`; each worker loads its own copy.
        framing: tokens put around each document; none by default.
        workers: processes on this machine; with 1, this process works, using the tokenizer library's own threads.
        backend: library that encodes batches, `tokenizers` or `gigatoken`.
        unit_bytes: size of a unit, in bytes of the inputs as stored.
        drop_duplicates: leave out documents whose text an earlier document of the corpus has.

    Returns:
        The number of tokens that this call has written.

    Raises:
        DataError: the folder was begun for another corpus, other options or another tokenizer; an input is bad or has
            changed; the disk is full; or workers die one after the other.
    """
    if workers < 1:
        raise DataError(f"--workers must be at least 1, found {workers}")
    framing = framing or DocumentMarkers()
    tokenizer = load_for_batches(tokenizer_path, backend, parallel=True)
    refuse_framing(tokenizer, framing)
    ledger = Ledger(folder)
    plan = ledger.begin(make_plan(corpus, tokenizer, framing, unit_bytes=unit_bytes, drop_duplicates=drop_duplicates))
    with _Progress(ledger, plan) as progress:
        left = len(plan.units) - len(ledger.done())
        if left and workers == 1:
            Worker(ledger, plan, tokenizer, max_bad_lines=corpus.max_bad_lines, show=progress.count).run()
        elif left:
            _Pool(ledger, (str(tokenizer_path), backend, corpus.max_bad_lines), len(plan.units), progress).run(
                min(workers, left)
            )
    _refuse_bad_lines(ledger, plan, corpus.max_bad_lines)
    return progress.tokens


def _refuse_bad_lines(ledger: Ledger, plan: ShardPlan, allowed: int) -> None:
    """Refuse too many bad lines in all units together, which processes that end at the same time may overlook."""
    found = sum(ledger.record(unit).bad_lines for unit in range(len(plan.units))) if allowed else 0
    if found > allowed:
        raise DataError(
            f"{ledger.folder}: wanted at most {allowed} bad lines, found {found} in all shards; raise --max-bad-lines"
        )


class _Progress:
    """Progress of the whole folder: units that are done by anyone, and what this machine has read since."""

    def __init__(self, ledger: Ledger, plan: ShardPlan) -> None:
        self._ledger, self._plan = ledger, plan
        self._sizes = [plan.bytes_of(unit) for unit in plan.units]
        self._report = ProgressReport("tokenizing", sum(self._sizes))
        self._started_s = time.monotonic()
        self._next_s = 0.0
        self.tokens = 0
        """Number of tokens that this machine has written."""

    def count(self, tokens: int) -> None:
        """Count tokens that one of this machine's workers has written."""
        self.tokens += tokens
        self.show()

    def show(self) -> None:
        """Show the progress, at most once a second."""
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + _SHOW_EVERY_S
        done = self._ledger.done()
        units = f"{len(done)} of {len(self._sizes)} units"
        read = sum(self._sizes[unit] for unit in done if unit < len(self._sizes))
        self._report.update(read, f"{units}, {speed_note(self.tokens, self._started_s)} here")

    def __enter__(self) -> _Progress:
        self._report.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._report.__exit__(None, None, None)


class _Pool:
    """The worker processes of one machine; one that is killed is replaced."""

    def __init__(self, ledger: Ledger, setup: tuple[str, str, int], units: int, progress: _Progress) -> None:
        self._ledger, self._units, self._progress = ledger, units, progress
        self._arguments = (str(ledger.folder), *setup)
        self._running: dict[Connection, SpawnProcess] = {}
        self._deaths = self._done_before = 0

    def run(self, workers: int) -> None:
        """Run until every unit is done.

        Raises:
            DataError: as for `make_shards`.
        """
        try:
            for _ in range(workers):
                self._start()
            while self._running:
                for ready in wait(list(self._running), timeout=_SHOW_EVERY_S):
                    assert isinstance(ready, Connection)
                    self._hear(ready)
                self._progress.show()
        finally:
            for process in self._running.values():
                process.terminate()
            for process in self._running.values():
                process.join()

    def _start(self) -> None:
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_work, args=(*self._arguments, theirs), daemon=True)
        with interrupts_held_back():
            process.start()
        theirs.close()
        self._running[ours] = process

    def _hear(self, connection: Connection) -> None:
        try:
            found = connection.recv()
        except (EOFError, OSError):
            self._end(connection)
            return
        if isinstance(found, _Refused):
            raise DataError(found.message)
        if isinstance(found, _Failed):
            raise RuntimeError(f"a worker process failed:\n{found.trace}")
        self._progress.count(found)

    def _end(self, connection: Connection) -> None:
        process = self._running.pop(connection)
        process.join()
        connection.close()
        if process.exitcode == 0:
            return
        done = len(self._ledger.done())
        self._deaths = 1 if done > self._done_before else self._deaths + 1
        self._done_before = done
        if self._deaths >= _MOST_DEATHS:
            raise DataError(
                f"{self._deaths} worker processes died one after the other (the last with exit code "
                f"{process.exitcode}), most likely out of memory; try fewer --workers"
            )
        if done < self._units:
            self._start()


def _work(folder: str, tokenizer_path: str, backend: str, max_bad_lines: int, connection: Connection) -> None:
    """Run a worker process, and send the numbers of tokens it writes, and how it failed."""
    begin_worker()
    try:
        ledger = Ledger(folder)
        tokenizer = load_for_batches(tokenizer_path, backend, parallel=False)
        Worker(ledger, ledger.plan(), tokenizer, max_bad_lines=max_bad_lines, show=connection.send).run()
    except MegadiffError as error:
        connection.send(_Refused(str(error)))
    except Exception:
        connection.send(_Failed(traceback.format_exc()))
