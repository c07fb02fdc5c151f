"""The folder with Transformer Engine's pure-Python wheel, and the marks of the tests that need it."""

from __future__ import annotations

import os

import pytest

FOLDER = os.environ.get("MEGADIFF_TRANSFORMER_ENGINE", "")
"""The folder, which `make test-versions` sets; empty where there is none."""

NEEDS_ENGINE = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not FOLDER, reason="no Transformer Engine: set MEGADIFF_TRANSFORMER_ENGINE, as `make test-versions` does"
    ),
]
