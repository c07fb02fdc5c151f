"""`--help` of every command: help, and nothing else."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked_command import REPOSITORY, call_forked

FOLDERS = (REPOSITORY / "tools", REPOSITORY / "tools/benchmarks", REPOSITORY / "slurm", REPOSITORY / "examples")
FORBIDDEN = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "shutil.rmtree"}
FORBIDDEN |= {"os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.kill"}


def is_command(path: Path) -> bool:
    """Whether a Python file does something when it is run."""
    body = ast.parse(path.read_text()).body
    return any(isinstance(part, ast.If) and "__main__" in ast.unparse(part.test) for part in body)


PYTHON = [REPOSITORY / "pretrain_dlm.py", REPOSITORY / "slurm/submit"]
PYTHON += [path for folder in FOLDERS for path in sorted(folder.glob("*.py")) if is_command(path)]
SHELL = [*sorted((REPOSITORY / "slurm").glob("*.sbatch")), REPOSITORY / "slurm/node.sh"]
SHELL += sorted((REPOSITORY / "tools/benchmarks").glob("*.sh"))


def forbid_work() -> None:
    """Let this process start nothing, delete nothing and write nothing but its two streams from here on."""
    sys.dont_write_bytecode = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        is_null = event == "open" and str(arguments[0]) == os.devnull
        if event in FORBIDDEN or (writes and not is_null):
            raise AssertionError(f"--help did {event} {arguments[:2]}")

    sys.addaudithook(watch)


def test_every_script_is_looked_at():
    assert {"demo", "generate", "gpu_head", "restart", "sample_exported"} <= {path.stem for path in PYTHON}
    assert {"gpu", "pretrain", "node"} <= {path.stem for path in SHELL}


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.stem)
def test_help_of_a_program_shows_help_and_does_nothing(path, option):
    ended = call_forked(path.relative_to(REPOSITORY), option, before=forbid_work)
    assert ended.code == 0, ended.err
    assert "usage: " in ended.out or path.stem == "restart"
    assert ended.err == ""
    assert path.name in ended.out


@pytest.mark.parametrize("option", ["--help", "-h"])
@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_help_of_a_shell_script_shows_its_head_and_does_nothing(path, option, tmp_path):
    done = subprocess.run(["bash", path, option], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) > 8
    assert "set -u" not in done.stdout
    assert not list(tmp_path.iterdir())
