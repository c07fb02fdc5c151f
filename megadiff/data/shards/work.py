"""Shards made by processes of one machine: take a unit, tokenize it, commit its shard, until none is left."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from megadiff.data.corpus_streams import CHUNK_BYTES, corpus_path, open_input
from megadiff.data.documents import SKIPPED, Corpus
from megadiff.data.duplicates import num_groups, repeats_of, write_digests, write_repeats
from megadiff.data.preprocess import (
    CONTEXT,
    DocumentMarkers,
    ProgressReport,
    begin_worker,
    interrupts_held_back,
    refuse_framing,
    speed_note,
    tokenize_part,
)
from megadiff.data.shards.ledger import Claims, Ledger, UnitInput, UnitRecord
from megadiff.data.shards.plan import UNIT_BYTES, PlannedUnit, ShardPlan, make_plan
from megadiff.data.tokenizers import Tokenizer, load_for_batches
from megadiff.errors import DataError, MegadiffError

_LOOK_EVERY_S = 0.5


class Worker:
    """One process at work on a folder of shards.

    Args:
        ledger: the folder.
        plan: its plan.
        tokenizer: the plan's tokenizer.
        max_bad_lines: bad lines to skip in the whole corpus before it is refused.
        show: function that is called now and then with the number of tokens written since the last call.
    """

    def __init__(
        self,
        ledger: Ledger,
        plan: ShardPlan,
        tokenizer: Tokenizer,
        *,
        max_bad_lines: int,
        show: Callable[[int], None],
    ) -> None:
        self._ledger, self._plan, self._tokenizer = ledger, plan, tokenizer
        self._max_bad_lines, self._show = max_bad_lines, show
        self._claims = Claims(ledger.claims_folder)
        self._repeats: list[Path] = []

    def run(self) -> None:
        """Make shards until every unit is done, also those of processes that were killed meanwhile.

        Raises:
            DataError: a unit cannot be made; those that are done stay.
        """
        if self._plan.settings.drop_duplicates:
            self._do_all(self._digests, self._write_digests)
            self._find_repeats()
        while left := sorted(set(range(len(self._plan.units))) - self._ledger.done()):
            if not any([self._try(unit) for unit in left]):
                time.sleep(_LOOK_EVERY_S)

    @property
    def _digests(self) -> list[Path]:
        return [self._ledger.digests_folder / f"{unit:06d}" for unit in range(len(self._plan.units))]

    def _find_repeats(self) -> None:
        try:
            groups = num_groups(self._digests)
        except OSError as error:
            if self._is_all_done():  # and the digests have been removed
                return
            raise self._ledger.refused(error) from error
        self._repeats = [self._ledger.repeats_folder / f"{group:04d}" for group in range(groups)]
        self._do_all(self._repeats, self._write_repeats)

    def _is_all_done(self) -> bool:
        return len(self._ledger.done()) == len(self._plan.units)

    def _do_all(self, files: list[Path], write: Callable[[int, Path], None]) -> None:
        """Write all of some files, each in one process; return at once when every shard is there without them."""
        while any(not path.exists() for path in files) and not self._is_all_done():
            if not any([self._do(number, path, write) for number, path in enumerate(files)]):
                time.sleep(_LOOK_EVERY_S)

    def _do(self, number: int, path: Path, write: Callable[[int, Path], None]) -> bool:
        claim = None if path.exists() else self._claims.take(f"{path.parent.name}-{path.name}")
        if claim is None:
            return False
        with claim:
            if path.exists():
                return False
            try:
                write(number, path)
            except OSError as error:
                raise self._ledger.refused(error) from error
        return True

    def _write_digests(self, unit: int, path: Path) -> None:
        planned = self._plan.units[unit]
        self._plan.refuse_changed(planned, self._ledger.folder)
        write_digests(self._plan.corpus_of(planned, max_bad_lines=self._max_bad_lines), path)

    def _write_repeats(self, group: int, path: Path) -> None:
        write_repeats(self._digests, path, group=group, groups=len(self._repeats))

    def _try(self, unit: int) -> bool:
        """Make the shard of a unit unless it is done or taken; return whether it was made."""
        if self._ledger.is_done(unit):
            return False
        claim = self._claims.take(f"{unit:06d}")
        if claim is None:
            return False
        with claim:
            if self._ledger.is_done(unit):
                return False
            self._make(unit, claim.maker, claim.dead_maker)
        return True

    def _make(self, unit: int, maker: str, dead_maker: str | None) -> None:
        begun_s = time.monotonic()
        planned = self._plan.units[unit]
        self._plan.refuse_changed(planned, self._ledger.folder)
        corpus = self._plan.corpus_of(planned, max_bad_lines=self._max_bad_lines)
        corpus.bad_lines_before = self._bad_lines_elsewhere()
        if self._plan.settings.drop_duplicates:
            corpus.duplicates = repeats_of(unit, self._repeats)
        whole = _WholeFile(self._plan, planned)
        with self._ledger.new_shard(unit, maker, dead_maker=dead_maker) as shard:
            manifest = tokenize_part(
                corpus, shard.prefix, self._tokenizer, framing=self._plan.framing, show=self._shown()
            )
            whole_sha256 = whole.sha256()
            self._plan.refuse_changed(planned, self._ledger.folder)
            report = corpus.report
            shard.commit(
                UnitRecord(
                    unit=unit,
                    inputs=_inputs_of(corpus),
                    whole_input_sha256=whole_sha256,
                    documents=0 if manifest is None else manifest.documents,
                    tokens=0 if manifest is None else manifest.tokens,
                    source_bytes=0 if manifest is None else manifest.source_bytes,
                    bin_sha256=None if manifest is None else manifest.bin_sha256,
                    bad_examples=tuple(report.bad_examples),
                    **{name: getattr(report, name) for name in SKIPPED},
                    host=os.environ.get("SLURMD_NODENAME", platform.node()),
                    process=os.getpid(),
                    job=os.environ.get("SLURM_JOB_ID"),
                    finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    elapsed_s=round(time.monotonic() - begun_s, 3),
                )
            )

    def _shown(self) -> Callable[[int], None]:
        before = 0

        def show(tokens: int) -> None:
            nonlocal before
            self._show(tokens - before)
            before = tokens

        return show

    def _bad_lines_elsewhere(self) -> int:
        if self._max_bad_lines == 0:
            return 0
        return sum(self._ledger.record(unit).bad_lines for unit in self._ledger.done())


def _inputs_of(corpus: Corpus) -> tuple[UnitInput, ...]:
    files = corpus.report.files
    return tuple(UnitInput(bytes=file.bytes, sha256=file.sha256, documents=file.documents) for file in files)


class _WholeFile:
    """The SHA-256 of the file of which a unit is the first range, computed while the unit is tokenized."""

    def __init__(self, plan: ShardPlan, unit: PlannedUnit) -> None:
        self._digest = hashlib.sha256()
        self._failure: OSError | DataError | None = None
        self._path = corpus_path(plan.inputs[unit.first].path)
        self._thread: threading.Thread | None = None
        if unit.end is not None and unit.start == 0:
            self._thread = threading.Thread(target=self._read, name="hash", daemon=True)
            self._thread.start()

    def sha256(self) -> str | None:
        """Return the hash (hex) once the whole file has been read; None for a unit that needs none."""
        if self._thread is None:
            return None
        self._thread.join()
        if isinstance(self._failure, DataError):
            raise self._failure
        if self._failure is not None:
            raise DataError(f"{self._path}: reading failed ({self._failure.strerror}); check the disk or the store")
        return self._digest.hexdigest()

    def _read(self) -> None:
        try:
            with open_input(self._path) as file:
                while chunk := file.read(CHUNK_BYTES):
                    self._digest.update(chunk)
        except (OSError, DataError) as error:
            self._failure = error


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
    tokenizer: Tokenizer | None = None,
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
        workers: processes on this machine; with 1, this process works, using the own threads of `tokenizers`.
        backend: library that encodes batches, `tokenizers` or `gigatoken`.
        tokenizer: the tokenizer as `chosen_backend` returned it, for this process; loaded by default.
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
    tokenizer = tokenizer or load_for_batches(tokenizer_path, backend)
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
        tokenizer = load_for_batches(tokenizer_path, backend)
        Worker(ledger, ledger.plan(), tokenizer, max_bad_lines=max_bad_lines, show=connection.send).run()
    except MegadiffError as error:
        connection.send(_Refused(str(error)))
    except Exception:
        connection.send(_Failed(traceback.format_exc()))
