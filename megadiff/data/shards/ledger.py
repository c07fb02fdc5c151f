"""The folder of shards as a ledger: which units are done, by which process, from which bytes.

    FOLDER/plan.json                      inputs, options and units
    FOLDER/shards/000000/tokens.bin       a shard with `tokens.idx` and `tokens.json`, which are absent if its unit has
                                          no documents, and `unit.json`, the record of its making
    FOLDER/claims/000001                  the process that is making a unit at present
    FOLDER/digests, FOLDER/repeats        files by which duplicates are found (`duplicates`), removed at the end
    FOLDER/tokens.idx, FOLDER/tokens.json index and manifest of all shards, written when the last one is there

A shard is made in a temporary folder and appears under its name, complete, by one rename; what is there is done.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import orjson
from pydantic import Field, ValidationError

from megadiff.config.section import Section
from megadiff.data.indexed_format import SHARDS, TOKENS, idx_path
from megadiff.data.indexed_manifest import Sha256
from megadiff.data.shards.plan import ShardPlan, plan_bytes, read_plan
from megadiff.errors import DataError
from megadiff.files import sync, write_atomically
from megadiff.untrusted_files import UnreadableFileError, read_bytes, why

_PLAN, _CLAIMS, _RECORD = "plan.json", "claims", "unit.json"
_DIGESTS, _REPEATS = "digests", "repeats"
_MAX_RECORD_BYTES = 2**28


class UnitInput(Section):
    """The part of one input that a unit read."""

    bytes: int = Field(ge=0)
    """Number of bytes read."""

    sha256: Sha256
    """SHA-256 (hex) of these bytes as stored."""

    documents: int = Field(ge=0)
    """Number of documents found in them."""


class UnitRecord(Section):
    """The content of a shard's `unit.json`."""

    unit: int = Field(ge=0)
    """Number of the unit."""

    inputs: tuple[UnitInput, ...]
    """Parts read, in the order of the plan's inputs."""

    whole_input_sha256: Sha256 | None = None
    """SHA-256 (hex) of the whole file of which the unit is the first range; None for other units."""

    documents: int = Field(ge=0)
    """Number of documents with tokens."""

    tokens: int = Field(ge=0)
    """Number of tokens."""

    source_bytes: int = Field(ge=0)
    """Number of UTF-8 bytes of the text."""

    bin_sha256: Sha256 | None
    """SHA-256 (hex) of the shard's `.bin`; None without documents."""

    empty_documents: int = Field(ge=0)
    """Number of documents without text or tokens."""

    bad_lines: int = Field(ge=0)
    """Number of bad lines that were skipped."""

    bad_examples: tuple[str, ...]
    """The first of them, as `file:line: reason`."""

    repaired_documents: int = Field(ge=0)
    """Number of documents in which halves of surrogate pairs were replaced."""

    too_short: int = Field(ge=0)
    """Number of documents with too few characters."""

    too_long: int = Field(ge=0)
    """Number of documents with too many characters."""

    other_split: int = Field(ge=0)
    """Number of documents of the other split."""

    duplicates: int = Field(ge=0)
    """Number of documents that repeat an earlier one."""

    host: str
    """Name of the machine that made the shard."""

    process: int
    """Number of the process that made it."""

    job: str | None
    """Job of the scheduler in which it ran, if any."""

    finished: str
    """Time at which it was finished, as ISO 8601 in UTC."""

    elapsed_s: float = Field(ge=0)
    """Time that it took, in seconds."""


class Ledger:
    """A folder of shards.

    Args:
        folder: path of the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.claims_folder = self.folder / _CLAIMS
        self.digests_folder, self.repeats_folder = self.folder / _DIGESTS, self.folder / _REPEATS
        self._shards = self.folder / SHARDS
        self._records: dict[int, UnitRecord] = {}

    @property
    def is_finished(self) -> bool:
        """Whether the index of all shards has been written."""
        return idx_path(self.folder / TOKENS).is_file()

    def begin(self, plan: ShardPlan) -> ShardPlan:
        """Create the folder with a plan, or compare the plan with that of a folder begun before.

        Several processes may begin the same folder at the same time; the first plan counts.

        Returns:
            The plan of the folder.

        Raises:
            DataError: the folder was begun for other inputs, options or another tokenizer, or cannot be written.
        """
        path = self.folder / _PLAN
        then = read_plan(path)
        if then is None:
            if self._has_other_content():
                raise DataError(
                    f"{self.folder}: wanted a new folder or one with {_PLAN}, found a folder with other content; give "
                    "another --shards folder"
                )
            try:
                self._shards.mkdir(parents=True, exist_ok=True)
                _write_once(path, plan_bytes(plan))
            except OSError as error:
                raise self.refused(error) from error
            then = read_plan(path)
            assert then is not None
        then.refuse_other(plan, self.folder)
        if len(self.done()) < len(then.units):
            try:
                by_text = (self.digests_folder, self.repeats_folder) if then.settings.drop_duplicates else ()
                for needed in (self.claims_folder, *by_text):
                    needed.mkdir(exist_ok=True)
            except OSError as error:
                raise self.refused(error) from error
        return then

    def plan(self) -> ShardPlan:
        """Return the plan of a folder that was begun before.

        Raises:
            DataError: there is none.
        """
        found = read_plan(self.folder / _PLAN)
        if found is None:
            raise DataError(
                f"{self.folder}: wanted a folder of shards, found no {_PLAN} in it; make one with `megadiff "
                f"preprocess_data --input ... --tokenizer ... --shards {self.folder}`"
            )
        return found

    def done(self) -> set[int]:
        """Return the numbers of the units that are done."""
        try:
            return {int(name) for name in os.listdir(self._shards) if name.isdecimal()}
        except OSError as error:
            raise DataError(f"{self._shards}: cannot be read ({error.strerror}); check its permissions") from error

    def is_done(self, unit: int) -> bool:
        """Return whether a unit is done."""
        return self._shard(unit).is_dir()

    def record(self, unit: int) -> UnitRecord:
        """Return the record of a unit that is done.

        Raises:
            DataError: it cannot be read or is damaged.
        """
        if unit not in self._records:
            path = self._shard(unit) / _RECORD
            remedy = f"remove {self._shard(unit)} and repeat the command, which makes it again"
            try:
                self._records[unit] = UnitRecord.model_validate(
                    orjson.loads(read_bytes(path, max_bytes=_MAX_RECORD_BYTES))
                )
            except (OSError, UnreadableFileError) as error:
                raise DataError(f"{path}: the record of a shard {why(error)}; {remedy}") from error
            except (orjson.JSONDecodeError, ValidationError) as error:
                raise DataError(f"{path}: the record of a shard is damaged; {remedy}") from error
        return self._records[unit]

    def prefix(self, unit: int) -> Path:
        """Return the prefix of a unit's shard."""
        return self._shard(unit) / TOKENS

    @contextmanager
    def new_shard(self, unit: int, maker: str, *, dead_maker: str | None) -> Iterator[NewShard]:
        """Yield a temporary folder for a shard, which disappears unless it is committed.

        Args:
            unit: number of the unit.
            maker: unique word of the process that makes it.
            dead_maker: that of a process that began the same unit and is gone; what it left is removed.

        Raises:
            DataError: the folder cannot be written.
        """
        if dead_maker is not None:
            shutil.rmtree(self._temporary(unit, dead_maker), ignore_errors=True)
        temporary = self._temporary(unit, maker)
        try:
            temporary.mkdir()
        except OSError as error:
            raise self.refused(error) from error
        try:
            yield NewShard(temporary, self._shard(unit))
        except OSError as error:
            raise self.refused(error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def write(self, name: str, content: Iterable[bytes]) -> None:
        """Write a file of the folder in one step.

        Raises:
            DataError: the disk refuses.
        """
        try:
            write_atomically(self.folder / name, content)
        except OSError as error:
            raise self.refused(error) from error

    def clear(self) -> None:
        """Remove what killed processes left; call only when all units are done."""
        for path in self._shards.glob(".*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        for folder in (self.claims_folder, self.digests_folder, self.repeats_folder):
            shutil.rmtree(folder, ignore_errors=True)

    def _has_other_content(self) -> bool:
        """Return whether the folder holds more than what other processes create while they begin it."""
        own = {SHARDS, _CLAIMS, _DIGESTS, _REPEATS}
        names = [path.name for path in self.folder.glob("*") if path.name not in own]
        begun = [name for name in names if not name.startswith((f".{_PLAN}.", f"..{_PLAN}.", _PLAN))]
        return bool(begun) or any(self._shards.glob("*"))

    def _shard(self, unit: int) -> Path:
        return self._shards / f"{unit:06d}"

    def _temporary(self, unit: int, maker: str) -> Path:
        return self._shards / f".{unit:06d}.{maker}.tmp"

    def refused(self, error: OSError) -> DataError:
        """Return the error for a disk that refused a write to the folder."""
        where = error.filename or self.folder
        return DataError(
            f"{where}: writing failed ({error.strerror}); free disk space or check its permissions, and repeat the "
            "command, which keeps the shards that are done"
        )


class NewShard:
    """A shard that is being made.

    Args:
        temporary: the folder with its files so far.
        final: the folder that it becomes.
    """

    def __init__(self, temporary: Path, final: Path) -> None:
        self._temporary, self._final = temporary, final
        self.prefix = temporary / TOKENS

    def commit(self, record: UnitRecord) -> bool:
        """Write the record and give the shard its name; return False where another process has done so before.

        Raises:
            OSError: the disk refuses.
        """
        content = orjson.dumps(record.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        write_atomically(self._temporary / _RECORD, content)
        try:
            os.rename(self._temporary, self._final)
        except OSError:
            if self._final.is_dir():
                return False
            raise
        sync(self._final.parent)
        return True


def _write_once(path: Path, content: bytes) -> None:
    """Write a file in one step unless there is one already."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    write_atomically(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links; plans that are made at the same time are mostly the same
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync(path.parent)
