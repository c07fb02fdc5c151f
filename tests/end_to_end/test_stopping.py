"""Asked to stop in any way, a run saves itself, ends with exit code 0 and goes on as if nothing had happened."""

from __future__ import annotations

import itertools
import re
import signal
import time

import pytest

from tests.support.machine_load import within
from tests.support.runs import toy_config
from tests.support.whole_runs import Ranks, curve, last_step, run_to_end, status

pytestmark = pytest.mark.end_to_end

STEPS = 32
TRIES = 3
"""Runs that are asked to stop in one way: one may end before it is asked."""


def _config(corpus, output, name, **changes):
    size = {"model__layers": 2, "batch__global_batch_size": 4, "schedule__steps": STEPS}
    base = {**size, "parallel__tensor": 2, "data__valid": []}
    return toy_config(corpus, output, name=name, **{**base, **changes})


@pytest.fixture(scope="module")
def uninterrupted(toy_corpus, tmp_path_factory):
    return run_to_end(_config(toy_corpus, tmp_path_factory.mktemp("stopping"), "whole"), 2)


def _signalled(number):
    """One rank alone is told, and not the main one."""
    return {}, lambda ranks: ranks.send(1, number), number.name


def _touch_stop_file(ranks):
    (ranks.config.folder / "STOP").touch()


WAYS = {
    "TERM": _signalled(signal.SIGTERM),
    "USR2": _signalled(signal.SIGUSR2),
    "INT": _signalled(signal.SIGINT),
    "stop file": ({}, _touch_stop_file, "stop file"),
    "time limit": ({"SLURM_JOB_END_TIME": "121"}, lambda ranks: None, "time limit: "),
}


def test_a_run_that_is_asked_to_stop_in_any_way_saves_itself_and_goes_on(
    toy_corpus, tmp_path, uninterrupted, monkeypatch
):
    """One run is asked in one way after the other and resumed after each; if it ends before that, another is asked."""
    monkeypatch.setattr("megadiff.supervision.stopping.FILE_EVERY_S", 0.0)  # the ranks are forked from here
    slow = {"watchdog": {"step_s": 60.0}}
    runs = (_config(toy_corpus, tmp_path, f"run-{number}", **slow) for number in itertools.count())
    config, at = next(runs), 0
    for way, (environ, ask, reason) in WAYS.items():
        for _ in range(TRIES):
            if "SLURM_JOB_END_TIME" in environ:  # two minutes of lead and a little: it stops when a second is gone
                environ = {"SLURM_JOB_END_TIME": str(int(time.time()) + 121)}
            ranks = Ranks(config, 2, environ)
            if not environ:
                ranks.wait_for_step(min(at + 2, STEPS))
            ask(ranks)
            assert ranks.end(within_s=60) == [0, 0], (way, ranks.said(0))
            before, at = at, last_step(config.folder)
            if at < STEPS:
                break
            assert curve(config.folder) == uninterrupted
            config, at = next(runs), 0
        else:
            pytest.fail(f"{way}: {TRIES} runs went on to their end")
        stopped = status(config.folder)
        assert (stopped["state"], stopped["step"], stopped["exit_code"]) == ("stopped", at, 0), way
        assert at > before
        assert not (config.folder / "STOP").exists()
        assert stopped["reason"].startswith(reason), way
        assert (config.folder / "LATEST").read_text() == f"step_{at:08d}\n"
        assert f"stopped after step {at} of {STEPS} ({reason}" in ranks.said(0)
        assert curve(config.folder) == uninterrupted[:at], way
    assert run_to_end(config, 2) == uninterrupted
    assert status(config.folder)["state"] == "finished"


def test_a_hanging_rank_is_named_and_the_run_resumes_from_its_checkpoint(toy_corpus, tmp_path, uninterrupted):
    limit = 3.0
    config = _config(toy_corpus, tmp_path, "run", checkpoint__every=5, watchdog__step_s=limit)
    ranks = Ranks(config, 2)
    ranks.wait_for_step(7)
    ranks.send(1, signal.SIGSTOP)
    struck = time.monotonic()
    codes = ranks.end(within_s=60)
    lasted = time.monotonic() - struck
    # Continued to write its stacks, it may meet the other's end before it is killed.
    assert codes[1] in (-signal.SIGKILL, 1)
    assert codes[0] != 0
    assert lasted <= within(limit + 2.0 + 2.0), lasted  # two seconds for less cores than ranks and watchers
    log = (config.folder / "log.txt").read_text()
    stalled = r"first cause: rank 1 \(.*\) stalled: in section (step|save) \d+ .*; state T \(stopped\)"
    assert re.search(stalled, log), log
    assert "loop.py" in log, "the stacks are there"
    ended = status(config.folder)
    assert (ended["state"], ended["exit_code"]) == ("failed", 6)
    assert run_to_end(config, 2) == uninterrupted


def test_a_rank_that_dies_takes_the_others_with_it_within_five_seconds(toy_corpus, tmp_path, uninterrupted):
    config = _config(toy_corpus, tmp_path, "run", checkpoint__every=5)
    ranks = Ranks(config, 2)
    ranks.wait_for_step(7)
    ranks.send(1, signal.SIGSEGV)
    struck = time.monotonic()
    codes = ranks.end(within_s=60)
    assert time.monotonic() - struck < 5.0
    assert codes[1] == -signal.SIGSEGV
    assert codes[0] != 0
    cause = r"first cause: rank 1 \(.*\) died in section (step|save) \d+.*: killed by SIGSEGV"
    end = time.monotonic() + 2.0  # watchers speak within a second of the last rank's end
    while status(config.folder)["state"] == "running" and time.monotonic() < end:
        time.sleep(0.05)
    assert re.search(cause, (config.folder / "log.txt").read_text())
    ended = status(config.folder)
    assert (ended["state"], ended["exit_code"]) == ("failed", 1)
    assert re.match(cause, ended["reason"])
    assert run_to_end(config, 2) == uninterrupted
