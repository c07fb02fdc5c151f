"""Shards made by one process: take a unit, tokenize it, commit its shard, until none is left."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from megadiff.data.corpus_streams import CHUNK_BYTES, open_input
from megadiff.data.documents import SKIPPED, Corpus
from megadiff.data.duplicates import num_groups, repeats_of, write_digests, write_repeats
from megadiff.data.preprocess import tokenize_part
from megadiff.data.remote_files import corpus_path
from megadiff.data.shards.claims import Claims
from megadiff.data.shards.ledger import Ledger, UnitInput, UnitRecord
from megadiff.data.shards.plan import PlannedUnit, ShardPlan
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import DataError

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
