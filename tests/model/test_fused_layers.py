"""Transformer Engine's layers built without a GPU: every name in use is there, and checkpoints are laid out alike.

`MEGADIFF_TRANSFORMER_ENGINE` names a folder with the pure-Python wheel unpacked; `make test-versions` sets it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import REPOSITORY
from tests.support.engine_folder import FOLDER, NEEDS_ENGINE
from tests.support.engine_without_gpu import LAYOUTS, RECIPES

pytestmark = NEEDS_ENGINE


def _look(folder: str) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.support.engine_without_gpu", folder]
    ended = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return _look(FOLDER)


def test_every_name_and_signature_in_use_is_there(found: dict[str, Any]) -> None:
    assert found["missing"] == []


@pytest.mark.parametrize("block", ["plain", "GIDD", "modern"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_either_kind_of_layers_is_laid_out_alike(
    found: dict[str, Any], layout: str, block: str
) -> None:
    for rank in found["built"][f"{layout}, {block}"]:
        assert len(rank["local"]) > 10
        layers = [key for key in rank["local"] if "linear_fc1.weight" in key]
        assert len(layers) == (3 if layout == "pipeline" else 6)
        assert rank["transformer_engine"] == rank["local"]
        assert {"NormedColumnLinear", "RowLinear"} <= set(rank["types"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_fp8_recipe_builds(found: dict[str, Any], recipe: str) -> None:
    (rank,) = found["built"][f"recipe {recipe}"]
    assert rank["recipe"] == recipe
    assert rank["transformer_engine"] == rank["local"]


def test_a_name_that_disappears_is_found(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "engine")
    base = tmp_path / "engine/transformer_engine/pytorch/module/base.py"
    text = base.read_text()
    assert "bootstrap_backend" in text
    base.write_text(text.replace("bootstrap_backend", "backend_of_bootstrap"))
    (missing,) = _look(str(tmp_path / "engine"))["missing"]
    assert "initialize_ub: got an unexpected keyword argument 'bootstrap_backend'" in missing
