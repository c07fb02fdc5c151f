"""The ends of commands: one sentence from one rank, and the launcher's error file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.support.commands import REPOSITORY, finish, start

MISTAKE = "raise MegadiffError('the sentence')"


def ended(tmp_path, statement: str, *, rank: int | None = None, wait: bool = True):
    """Run a command whose main is one statement; under torchrun's variables where it has a rank."""
    code = f"from megadiff.errors import *\ndef main():\n    {statement}\nrun_command(main)"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    env.pop("TORCHELASTIC_ERROR_FILE", None)
    if rank is not None:
        env |= {"RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    ignoring = ["bash", "-c", 'trap "" TERM; exec "$@"', "bash"]  # as the batch scripts do
    process = subprocess.Popen([*ignoring, sys.executable, "-c", code], env=env, text=True, stderr=subprocess.PIPE)
    return process.communicate(timeout=300)[1] if wait else process, process


def summary(tmp_path) -> str:
    """Return what torchrun's summary shows of a rank's file."""
    return json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"]


@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_whose_reader_has_left_ends_without_a_word(lines):
    code = f"from megadiff.errors import *; run_command(lambda: print('line\\n' * {lines}))"
    reading, writing = os.pipe()
    os.close(reading)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, text=True, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (found.returncode, found.stderr) == (141, "")


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path):
    err, process = ended(tmp_path, MISTAKE)
    assert (process.returncode, err) == (2, "error: the sentence\n")
    assert not list(tmp_path.iterdir())


def test_the_first_rank_reports_at_once_to_stderr_and_to_the_launcher(tmp_path):
    err, process = ended(tmp_path, MISTAKE, rank=0)
    assert (process.returncode, err, summary(tmp_path)) == (2, "error: the sentence\n", "the sentence")


def test_only_the_first_rank_reports_and_others_end_silently(tmp_path):
    process = ended(tmp_path, MISTAKE, rank=1, wait=False)[1]
    time.sleep(1.0)
    process.terminate()
    assert process.communicate(timeout=50)[1] == ""
    assert not list(tmp_path.iterdir())


def test_another_rank_whose_mistake_is_its_own_reports_it(tmp_path):
    err, process = ended(tmp_path, MISTAKE, rank=1)
    assert (process.returncode, err, summary(tmp_path)) == (2, "error: the sentence\n", "the sentence")


def test_a_missing_package_is_named_with_what_to_do(tmp_path):
    err, process = ended(tmp_path, "import a_library_nobody_has")
    assert process.returncode == 2
    assert err.startswith("error: the package `a_library_nobody_has` is not installed for ")
    assert "pip install -e ." in err
    assert len(err.splitlines()) == 1


def test_a_fault_of_our_own_keeps_its_trace(tmp_path):
    err, process = ended(tmp_path, "1 / 0", rank=0)
    assert process.returncode == 1
    assert "Traceback" in err
    assert summary(tmp_path) == "ZeroDivisionError: division by zero"


@pytest.mark.end_to_end
def test_torchrun_shows_a_mistake_of_all_ranks_once_and_in_its_summary():
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    code, _, err = finish(start(*launch, "pretrain_dlm.py", "--config", "examples/demo.yaml", "optimizer.lrr=3"))
    assert code == 1
    assert err.count("unknown key `optimizer.lrr`; did you mean `optimizer.lr`?") == 2
    assert err.count("error: command line: unknown key") == 1
    assert "exitcode  : 2" in err
    assert "traceback : command line: unknown key `optimizer.lrr`" in err
    assert 'pretrain_dlm.py", line' not in err
