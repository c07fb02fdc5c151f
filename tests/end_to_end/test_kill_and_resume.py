"""`pretrain_dlm.py` as a user runs it, killed without warning, started again with the same command.

The command that is killed is a process of its own; the one that follows is forked, which saves its imports.
"""

from __future__ import annotations

import json
import os
import signal

import psutil
import pytest

from tests.support.commands import finish, start, wait_for_step, write_yaml
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import RunConfig, largest_relative_difference, read_metrics, toy_tree, train_on_rank

pytestmark = pytest.mark.end_to_end

EVERY, STEPS = 24, 48
COMPARED = ("loss", "elbo", "kl", "itakura_saito", "weight", "grad_norm", "lr")


@pytest.fixture(scope="module")
def description(toy_corpus, tmp_path_factory):
    """The run's tree and file."""
    folder = tmp_path_factory.mktemp("end_to_end")
    tree = toy_tree(toy_corpus, folder, model__layers=2, schedule__steps=STEPS, checkpoint__every=EVERY, data__valid=[])
    return tree, write_yaml(folder / "toy.yaml", tree)


@pytest.fixture(scope="module")
def uninterrupted(description):
    tree, _ = description
    return on_ranks(1, train_on_rank, RunConfig.model_validate({**tree, "name": "whole"}), 1)[0].lines


def training_lines(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "one line a step, in order"
    return lines


def test_a_run_killed_between_two_checkpoints_goes_on_to_the_same_curve(description, uninterrupted, tmp_path):
    _, path = description
    command = ("pretrain_dlm.py", "--config", path, f"output_dir={tmp_path}")
    folder = tmp_path / "toy"
    first = start(*command)
    wait_for_step(folder, EVERY + 3, first)
    first.kill()
    assert finish(first)[0] == -signal.SIGKILL
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{EVERY:08d}"]

    code, out, err = call_forked(*command)

    assert code == 0, err
    assert f"resuming from {folder}/checkpoints/step_{EVERY:08d} after step {EVERY} of {STEPS}" in out
    lines = training_lines(folder)
    assert [[line[key] for key in COMPARED] for line in lines] == [
        [line[key] for key in COMPARED] for line in uninterrupted
    ]
    assert (folder / "LATEST").read_text() == f"step_{STEPS:08d}\n"
    assert f"resuming from {folder}" in (folder / "log.txt").read_text()
    assert json.loads((folder / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text())["samples"] == STEPS * 8


def test_a_tensor_rank_killed_under_torchrun_goes_on_as_one_process(description, uninterrupted, tmp_path):
    _, path = description
    folder = tmp_path / "toy"
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    first = start(*launch, "pretrain_dlm.py", "--config", path, f"output_dir={tmp_path}", "parallel.tensor=2")
    wait_for_step(folder, EVERY + 3, first)
    workers = [p for p in psutil.Process(first.pid).children(recursive=True) if "pretrain_dlm.py" in p.cmdline()]
    next(p for p in workers if p.environ().get("RANK") == "1").kill()
    assert finish(first)[0] != 0

    code, out, err = call_forked("pretrain_dlm.py", "--config", path, f"output_dir={tmp_path}")

    assert code == 0, err
    assert f"after step {EVERY} of {STEPS}" in out
    lines = training_lines(folder)
    for key, allowed in {"loss": 1e-5, "elbo": 1e-5, "grad_norm": 1e-3}.items():
        curves = [[line[key] for line in source] for source in (lines, uninterrupted)]
        assert largest_relative_difference(*curves) <= allowed, key


def test_a_folder_in_use_is_refused_and_ctrl_c_saves(description, tmp_path):
    _, path = description
    command = ("pretrain_dlm.py", "--config", path, f"output_dir={tmp_path}", "schedule.steps=1000000")
    first = start(*command)
    wait_for_step(tmp_path / "toy", 1, first)
    code, _, err = call_forked(*command)
    assert code == 2
    holder = f"(it holds {tmp_path}/toy/.lock): pid {first.pid} on {os.uname().nodename}; stop it or wait for its end"
    assert err.startswith(f"error: another process trains in {tmp_path}/toy {holder}")
    assert len(err.splitlines()) == 1
    first.send_signal(signal.SIGINT)
    code, out, err = finish(first)
    assert (code, err) == (0, "")
    stopped = json.loads((tmp_path / "toy/status.json").read_text())
    last = f"stopped after step {stopped['step']} of 1000000 (SIGINT); run the same command again to go on\n"
    assert out.endswith(last)
    assert (tmp_path / "toy/LATEST").read_text() == f"step_{stopped['step']:08d}\n"
