"""The folder of shards as a ledger: which units are done, by which process, from which bytes, and which are claimed.

    FOLDER/plan.json                      inputs, options and units
    FOLDER/shards/000000/tokens.bin       a shard with `tokens.idx` and `tokens.json`, which are absent if its unit has
                                          no documents, and `unit.json`, the record of its making
    FOLDER/claims/000001                  the process that is making a unit at present
    FOLDER/digests, FOLDER/repeats        files by which duplicates are found (`duplicates`), removed at the end
    FOLDER/tokens.idx, FOLDER/tokens.json index and manifest of all shards, written when the last one is there

A shard is made in a temporary folder and appears under its name, complete, by one rename; what is there is done.

A claim is a file that its process locks and rewrites every few seconds with a new number. The kernel drops the lock of
a killed process, so on one machine its unit is free at once. The file of a process on another machine, or on a file
system without locks, must stay the same for a while, as seen by the clock of the machine that looks at it.

Claims only save work. Two processes that make the same unit write the same bytes, and one rename decides.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import orjson
from pydantic import Field, ValidationError

from megadiff.config.section import Section
from megadiff.data.indexed_format import SHARDS, TOKENS, Sha256, idx_path
from megadiff.data.shards.plan import ShardPlan, plan_bytes, read_plan
from megadiff.errors import DataError
from megadiff.files import UnreadableFileError, read_bytes, sync, why, write_atomically

BEAT_S = 5.0
"""Time between two signs of life, in seconds."""

PATIENCE_S = 60.0
"""Time without a sign of life after which a process on another machine counts as dead, in seconds."""

_SETTLING_S = 0.2
_MOST_BYTES = 2**12
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_machine() -> str:
    """Return an identifier of this machine since it was started; its name where the system offers none."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


class Claim:
    """A unit that this process has taken; a context manager that gives it back.

    Args:
        path: the claim's file.
        descriptor: the open file, locked where the file system has locks.
        maker: unique word for this claim, for the names of temporary files.
        dead_maker: that of an earlier claim whose process is gone.
    """

    def __init__(self, path: Path, descriptor: int, maker: str, dead_maker: str | None) -> None:
        self.maker, self.dead_maker = maker, dead_maker
        self._path, self._descriptor = path, descriptor
        self._beats = 0
        self._ended = threading.Event()
        self.beat()
        self._thread = threading.Thread(target=self._beat_on, name="claim", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Show that this process lives; a full disk delays the sign."""
        self._beats += 1
        sign = {
            "maker": self.maker,
            "machine": this_machine(),
            "host": platform.node(),
            "process": os.getpid(),
            "beats": self._beats,
        }
        with suppress(OSError):
            os.pwrite(self._descriptor, orjson.dumps(sign).ljust(_MOST_BYTES // 8), 0)
            os.fsync(self._descriptor)  # or a network disk would keep it from other machines for half a minute

    def is_kept(self) -> bool:
        """Return whether the file still holds this claim, which matters where there are no locks."""
        holder = _holder(os.pread(self._descriptor, _MOST_BYTES, 0))
        return holder is not None and holder["maker"] == self.maker

    def _beat_on(self) -> None:
        while not self._ended.wait(BEAT_S):
            self.beat()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)

    def leave(self) -> None:
        """Give no more signs of life, and leave the file to another process."""
        self._ended.set()
        self._thread.join()


class Claims:
    """The claims in a folder, as one process sees them.

    Args:
        folder: the folder of claims.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._machine = this_machine()

    def take(self, name: str) -> Claim | None:
        """Return the claim on a unit; None if another process has it, or may have it.

        Raises:
            DataError: the folder cannot be written.
        """
        path = self._folder / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the folder of a finished corpus is removed
            return None
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error.strerror}); check the permissions of the --shards folder"
            ) from error
        claim = self._taken(path, descriptor)
        if claim is None:
            os.close(descriptor)
        return claim

    def _taken(self, path: Path, descriptor: int) -> Claim | None:
        has_lock = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError:
            has_lock = False
        if not _is_at(path, descriptor):
            return None  # given back while it was opened
        content = os.pread(descriptor, _MOST_BYTES, 0)
        holder = _holder(content)
        is_known_dead = has_lock and holder is not None and holder["machine"] == self._machine
        if holder is not None and not is_known_dead and not self._is_silent(path.name, content):
            return None
        claim = Claim(path, descriptor, secrets.token_hex(8), None if holder is None else holder["maker"])
        if not has_lock:
            time.sleep(_SETTLING_S)
            if not claim.is_kept():
                claim.leave()
                return None
        return claim

    def _is_silent(self, name: str, content: bytes) -> bool:
        now = time.monotonic()
        then = self._seen.get(name)
        if then is None or then[0] != content:
            self._seen[name] = content, now
            return False
        return now - then[1] >= PATIENCE_S


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.fstat(descriptor).st_ino == os.stat(path).st_ino
    except OSError:
        return False


def _holder(content: bytes) -> dict[str, str] | None:
    """Return the maker and the machine that a claim names; None if it names none."""
    try:
        found = orjson.loads(content)
        maker, machine = found["maker"], found["machine"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    is_word = isinstance(maker, str) and maker.isalnum() and isinstance(machine, str)
    return {"maker": maker, "machine": machine} if is_word else None


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
