"""Commands load neither torch nor Megatron to refuse a mistake, and Megatron only to run its model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY, write_yaml
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, toy_tree, train_on_rank

_ONE_AFTER_ANOTHER = """
import contextlib, io, json, sys
from megadiff.__main__ import main

found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["megadiff", *words]
    code = 0
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    heavy = {"torch", "megatron", "transformers", "torch._dynamo", "torch._inductor"} & set(sys.modules)
    found.append([code, sorted(heavy)])
print(json.dumps(found))
"""


def _codes_and_modules(*commands: list[str | Path]) -> list[list]:
    """Run commands one after another in one new process; the exit code and the heavy modules present after each."""
    words = json.dumps([list(map(str, command)) for command in commands])
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", _ONE_AFTER_ANOTHER, words]
    ended = subprocess.run(program, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture
def description(toy_corpus: Path, tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "run.yaml", toy_tree(toy_corpus, tmp_path))


def test_a_mistake_is_refused_before_torch_is_loaded(description, tmp_path):
    nothing = tmp_path / "nothing"
    check = ["train", "--config", description, "--check"]
    found = _codes_and_modules(
        [*check, "optimiser.name=adamw"],  # its suggestion looks into every member of every family
        [*check, "seed=three"],
        [*check, "optimizer.name=lapro"],
        [*check, "optimizer.name=muon", "optimizer.momentum=2"],
        ["generate", "--model", nothing],
        ["generate", "--model", description],
        ["evaluate", "elbo", "--model", nothing, "--data", nothing],
        ["convert_checkpoint", "export", "--checkpoint", nothing, "--output", tmp_path / "out"],
        ["convert_checkpoint", "import", "--input", nothing, "--output", tmp_path / "out"],
    )
    assert found == [[2, []]] * len(found)


def test_check_export_and_import_load_no_megatron(description, toy_corpus, tmp_path):
    config = toy_config(toy_corpus, tmp_path, model__layers=1, data__valid=[], schedule__steps=4)
    on_ranks(1, train_on_rank, config, 1, save=True)
    found = _codes_and_modules(
        ["train", "--config", description, "--check", "name=other"],
        ["convert_checkpoint", "export", "--checkpoint", config.folder, "--output", tmp_path / "folder"],
        ["convert_checkpoint", "import", "--input", tmp_path / "folder", "--output", tmp_path / "back"],
    )
    assert found == [[0, ["torch"]]] * 3
