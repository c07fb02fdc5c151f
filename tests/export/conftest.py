"""Nothing here reaches for the network or for a person's own cache of model code."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="hf_modules_"))

import pytest

from tests.export.runs import trained

LAYOUTS = {
    "tp1": (1, {}),
    "tp2_pp2": (4, {"parallel": {"tensor": 2, "pipeline": 2, "sequence": True}}),
    "pp2_vpp2": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True}}),
}


class _Checkpoints(dict[str, Path]):
    """Step folders by layout, each trained when it is first asked for: most files want a single one."""

    def __init__(self, corpus: Path, root: Path) -> None:
        super().__init__()
        self._corpus, self._root = corpus, root

    def __missing__(self, name: str) -> Path:
        ranks, changes = LAYOUTS[name]
        self[name] = trained(self._corpus, self._root, ranks, name=name, **changes)
        return self[name]


@pytest.fixture(scope="session")
def checkpoints(toy_corpus, tmp_path_factory):
    """`{layout: step folder}` of a trained GIDD block on each layout."""
    return _Checkpoints(toy_corpus, tmp_path_factory.mktemp("export"))
