"""Runs and checkpoints of two generations of megatron-core: the same curve, and each resumes what the other saved.

`MEGADIFF_OTHER_CORE` names a folder that holds another version of megatron-core than the environment; `make
test-versions` installs one there and sets it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megadiff.testing.toy_run import SAVED, STEPS, copy_as_killed
from tests.support.commands import REPOSITORY, write_yaml
from tests.support.runs import GIDD_BLOCK, largest_relative_difference, read_metrics, toy_tree

OTHER = os.environ.get("MEGADIFF_OTHER_CORE", "")
pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(
        not OTHER, reason="no other megatron-core: set MEGADIFF_OTHER_CORE, as `make test-versions` does"
    ),
]
CORES = {"own": [str(REPOSITORY)], "other": [OTHER, str(REPOSITORY)]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "own": (1, {}),
    "other": (2, {"parallel__tensor": 2, "parallel__sequence": True, "parallel__distributed_optimizer": True}),
}
"""Ranks and layout that each of them trains on, so that what one resumes was cut differently by the other."""


def _train(core: str, corpus: Path, output: Path, name: str) -> None:
    """Train to the end, in fresh processes that find this core first."""
    ranks, layout = LAYOUTS[core]
    block = {f"model__{key}": value for key, value in GIDD_BLOCK.items()}
    size = {"model__layers": 2, "schedule__steps": STEPS, "checkpoint__every": SAVED, "checkpoint__keep": 0}
    path = write_yaml(output / f"{name}.yaml", toy_tree(corpus, output, name=name, **size, **block, **layout))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(CORES[core])}
    command = [sys.executable, *launch, "pretrain_dlm.py", "--config", str(path)]
    ended = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr
    assert "megatron" not in ended.stdout + ended.stderr, "the library's advice is not for users"


def _curve(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line]


def _version(folder: Path) -> str:
    manifest = json.loads((folder / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text())
    return manifest["versions"]["megatron-core"]


def test_two_cores_train_the_same_curve_and_resume_each_others_runs(toy_corpus: Path, tmp_path: Path) -> None:
    for core in CORES:
        _train(core, toy_corpus, tmp_path, core)
    for saver, resumer in (("own", "other"), ("other", "own")):
        name = f"{saver}-{resumer}"
        copy_as_killed(tmp_path / saver, tmp_path / name)
        _train(resumer, toy_corpus, tmp_path, name)
        assert _version(tmp_path / name) == _version(tmp_path / resumer) != _version(tmp_path / saver)
    for name in ("other", "own-other", "other-own"):
        for key, allowed in {"loss": 1e-6, "elbo": 1e-6, "grad_norm": 1e-5, "eval_elbo": 1e-6}.items():
            there, here = _curve(tmp_path / name, key), _curve(tmp_path / "own", key)
            assert largest_relative_difference(there, here) <= allowed, (name, key)
