"""The check of a run loads what reads its description and its data, and nothing that builds a model."""

from __future__ import annotations

import subprocess
import sys

from tests.support.commands import REPOSITORY

_CHECK = """
import sys
from megadiff.cli import train

sys.argv = ["megadiff train", "--config", "examples/demo.yaml", "--check", *sys.argv[1:]]
train.main()
print("loaded:", *sorted({"torch", "megatron", "sympy"} & set(sys.modules)))
"""


def test_a_check_with_its_data_loads_no_megatron_core(toy_corpus, tmp_path):
    settings = [f"data.train=[{toy_corpus}]", f"data.valid=[{toy_corpus}]", "data.tokenizer=byte"]
    command = [sys.executable, "-c", _CHECK, *settings, f"output_dir={tmp_path}"]
    printed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()
    assert any(line.startswith("bytes per rank") for line in printed)
    assert any(line.startswith("  data.train[0]") for line in printed)
    assert printed[-1] == "loaded: torch"
