"""Check of the collectives: a process group on this node computes a sum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from megadiff.doctor.examination import Finding, Subject, fail, ok

if TYPE_CHECKING:
    from megadiff.platform.machine import Platform

_ON_CPU = "see that the host's name resolves (/etc/hosts), or name a network interface in GLOO_SOCKET_IFNAME"
_ON_GPU = "run again with NCCL_DEBUG=INFO; see that torch's build fits the driver, or name NCCL_SOCKET_IFNAME"


def check(subject: Subject) -> Iterable[Finding]:
    """Check gloo always, and NCCL if there are GPUs."""
    from megadiff.platform.machine import detect

    yield _tried(detect("cpu"), 2)
    if not subject.platform.is_cpu:
        yield _tried(subject.platform, min(2, subject.platform.local_devices()))


def _tried(platform: Platform, ranks: int) -> Finding:
    from megadiff.doctor.collective import try_all_reduce

    try:
        seconds = try_all_reduce(platform, ranks)
    except RuntimeError as error:
        message = f"{platform.backend}: an all-reduce over {ranks} rank(s) failed: {error}"
        return fail(message, _ON_CPU if platform.is_cpu else _ON_GPU)
    return ok(
        f"{platform.backend}: an all-reduce over {ranks} rank(s) of this node took {seconds:.1f} s with its start"
    )
