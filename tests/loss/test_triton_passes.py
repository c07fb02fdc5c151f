"""The Triton kernels without a GPU: their arithmetic under Triton's interpreter, their compilation for a Hopper GPU.

Triton decides when it is imported whether it interprets, so each has a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]

IS_MISSING = importlib.util.find_spec("triton") is None
IS_OLD = not IS_MISSING and Version(version("triton")) < Version("3.7")

pytestmark = pytest.mark.skipif(IS_MISSING, reason="needs the package triton; it is not installed here")


@pytest.mark.parametrize(
    ("name", "interpreted"),
    [
        pytest.param(
            "interpreted_passes",
            "1",
            marks=pytest.mark.skipif(IS_OLD, reason="triton before 3.7 cannot interpret a loop with numpy 2.4"),
        ),
        ("compiled_passes", "0"),
    ],
)
def test_in_a_process_of_its_own(name, interpreted, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", f"tests/loss/{name}.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": interpreted, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
