"""The shell of the batch scripts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "slurm"
SHELL = sorted(path for pattern in ("*.sh", "*.sbatch", "site.env.example") for path in SLURM.glob(pattern))


def test_there_is_a_script_for_every_job():
    jobs = {"pretrain", "preprocess", "merge", "evaluate", "sweep", "convert"}
    assert {path.stem for path in SHELL if path.suffix == ".sbatch"} == jobs


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    done = subprocess.run(["shellcheck", "-x", path], cwd=SLURM.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_no_script_makes_shell_text_of_what_it_was_given(path):
    """What would: eval, a here-document fed to a shell, `bash -c` with anything but a constant."""
    code = [line.split(" #")[0] for line in path.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(code)
    assert "eval " not in text
    assert "--wrap" not in text
    assert all("bash -c '" in line for line in code if "bash -c" in line)


@pytest.mark.parametrize("path", [path for path in SHELL if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_every_job_may_be_started_again_and_keeps_its_log(path):
    lines = path.read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
