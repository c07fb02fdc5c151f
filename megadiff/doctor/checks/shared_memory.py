"""Check of the memory shared by processes of a node, through which NCCL moves data between GPUs of a node."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from megadiff.doctor.examination import Finding, Subject, ok, warn

_ON_CPU, _ON_GPU = 2**24, 2**30


def check(subject: Subject) -> Iterable[Finding]:
    """Check its size: containers start with 64 MiB, which is enough on CPU only."""
    remedy = "start the container with --shm-size=8g or --ipc=host, or mount a larger tmpfs there"
    try:
        size = shutil.disk_usage(subject.shared_memory).total
    except OSError as error:
        yield warn(f"{subject.shared_memory} cannot be used ({error.strerror})", remedy)
        return
    wanted = _ON_CPU if subject.platform.is_cpu else _ON_GPU
    message = f"{subject.shared_memory} has {size / 2**20:,.0f} MiB"
    yield ok(message) if size >= wanted else warn(f"{message}, wanted {wanted / 2**20:,.0f}", remedy)
