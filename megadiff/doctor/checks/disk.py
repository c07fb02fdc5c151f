"""Check of the run folder's disk: it can be written, is large and fast enough, and does what checkpoints rely on."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn

_PROBE_BYTES = 2**24
_SLOW_BYTES_PER_S = 20e6
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay"}


def check(subject: Subject) -> Iterable[Finding]:
    """Check that the disk can be written, its free space, and whether several nodes see the same files."""
    folder = subject.existing_folder
    try:
        rate = written_per_second(folder)
    except OSError as error:
        yield fail(
            f"{folder} cannot be written ({error.strerror or error})", "set output_dir to a folder you can write to"
        )
        return
    message = f"{folder}: write, fsync and rename work; {rate / 1e6:,.0f} MB/s from one process"
    slow = "a network disk for small files? set output_dir to a faster one, or save more rarely (checkpoint.every)"
    yield ok(message) if rate > _SLOW_BYTES_PER_S else warn(message, slow)
    yield from _room(subject, folder, rate)
    yield from _shared(subject, folder)


def written_per_second(folder: Path) -> float:
    """Return the bytes written per second to a new file, fsync included.

    All operations that a checkpoint needs are tried, and all files are removed afterwards.

    Raises:
        OSError: an operation does not work.
    """
    place = Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    try:
        block = os.urandom(2**20)
        start = time.monotonic()
        with (place / "probe.tmp").open("xb") as file:
            for _ in range(_PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - start
        (place / "probe.tmp").rename(place / "probe")
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return _PROBE_BYTES / max(seconds, 1e-9)


def _room(subject: Subject, folder: Path, rate: float) -> Iterable[Finding]:
    config, vocab_size = subject.config, subject.vocab_size
    if config is None or vocab_size is None:
        return
    from megadiff.run.summary import checkpoint_bytes

    one = checkpoint_bytes(config, config.shape(vocab_size=vocab_size))
    kept = config.checkpoint.keep or -(-config.steps // config.checkpoint.every)
    needed, free = one * (kept + 1), shutil.disk_usage(folder).free
    message = (
        f"{kept} checkpoint(s) kept and one being written take {needed / 2**30:.3g} GiB ({one / 2**30:.3g} GiB each, "
        f"{one / rate:,.0f} s at one process's rate); {free / 2**30:.3g} GiB are free"
    )
    remedy = "free some space, lower checkpoint.keep (0 keeps all), or set output_dir to a larger disk"
    yield ok(message) if needed <= free else fail(message, remedy)


def _shared(subject: Subject, folder: Path) -> Iterable[Finding]:
    if subject.nodes == 1:
        return
    kind = file_system_of(folder)
    message = (
        f"{subject.nodes} nodes must see one {folder}, which is on {kind}; that cannot be checked from a single node"
    )
    remedy = (
        f"see that `srun -N {subject.nodes} ls -di {folder}` prints one number; if not, set output_dir to a shared disk"
    )
    yield warn(f"{message}, but {kind} is usually a node's own" if kind in _LOCAL else message, remedy)


def file_system_of(folder: Path) -> str:
    """Return the type of the file system that holds a folder, as the kernel names it."""
    real = str(folder.resolve())
    mounts = [
        line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    holding = [(len(point), kind) for _, point, kind, *_ in mounts if f"{real}/".startswith(f"{point.rstrip('/')}/")]
    return max(holding, key=lambda found: found[0])[1] if holding else "an unknown file system"
