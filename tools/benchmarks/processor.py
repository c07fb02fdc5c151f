"""The machine of a benchmark, for the head of its table."""

from __future__ import annotations

import os
import platform as host
from pathlib import Path


def processor() -> str:
    """Return the name of the processor from Linux's /proc/cpuinfo."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else host.processor() or host.machine()


def with_torch() -> str:
    """Return the kind of processor, the cores, and torch's threads and version."""
    import torch  # not where only the processor's name is needed

    where = host.processor() or host.machine()
    return f"{where}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
