"""A rank without memory says how much its layout takes and what would take less, on one line and without a trace."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest
import torch

from megadiff.parallel.config import Layout
from megadiff.run.summary import memory_shortage
from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import toy_config, toy_tree

SPARE_BYTES = 2 * 2**30
"""For threads and their stacks, and less than one matrix of the model below."""
REMEDY = (
    r"the estimate for this layout is [\d.e-]+ GiB a rank: lower batch\.micro_batch_size \(2\), raise parallel\.tensor "
    r"\(1\) or parallel\.pipeline \(1\), set parallel\.distributed_optimizer=true, or take more memory; `megadiff d"
)


def _leave_little() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))


def test_a_model_too_large_for_the_machine_ends_in_a_sentence(toy_corpus, tmp_path):
    tree = toy_tree(toy_corpus, tmp_path, model__hidden=16384)
    ended = call_forked("pretrain_dlm.py", "--config", write_yaml(tmp_path / "run.yaml", tree), before=_leave_little)
    assert ended.code == 1
    (line,) = ended.err.strip().splitlines()
    assert re.match(r"error: out of memory \(.*allocate.*\); " + REMEDY, line), line
    status = json.loads((tmp_path / "toy/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["reason"] == line.removeprefix("error: ")


@pytest.fixture
def said(toy_corpus, tmp_path):
    config = toy_config(toy_corpus, tmp_path)
    return lambda error: memory_shortage(error, config, Layout(1, 1, 1, 1, 4), config.shape(vocab_size=260))


def test_a_full_device_is_said_with_what_was_asked_of_it(said):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 is full.")
    found = str(said(error))
    assert re.match(r"out of memory \(CUDA out of memory\. Tried to allocate 2\.00 GiB\); " + REMEDY, found), found


@pytest.mark.parametrize(
    "error", [ValueError("no such sequence"), RuntimeError("shapes"), KeyboardInterrupt()], ids=repr
)
def test_what_is_no_shortage_stays_what_it_is(said, error):
    assert said(error) is None
