"""A real Slurm for the tests that ask for one."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.slurm.local_cluster import local_cluster, missing


@pytest.fixture(scope="session")
def cluster():
    """Two nodes of four dummy GPUs each; its folder's path is short, for Slurm keeps sockets in it."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder,
        local_cluster(Path(folder)) as running,
    ):
        yield running
