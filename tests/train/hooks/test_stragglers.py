from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
import torch

from megadiff.platform.machine import detect, stopwatch
from megadiff.train.hooks.stragglers import ComputeTimers, StragglerHook, has_contended_cores, shared_cores, slow_ranks


def test_a_rank_is_compared_with_the_median_of_its_stage():
    """The second stage, with the head, takes longer; that makes none of its ranks slow."""
    times = [(0, 1.0), (1, 3.0), (0, 1.1), (1, 3.1), (0, 1.9), (1, 3.0)]
    assert slow_ranks(times, ratio=1.5) == [(4, 1.9, 1.1)]
    assert slow_ranks(times, ratio=2.0) == []


def test_of_two_ranks_the_slower_one_is_named_and_one_alone_never_is():
    assert slow_ranks([(0, 1.0), (0, 2.0)], ratio=1.5) == [(1, 2.0, 1.0)]
    assert slow_ranks([(0, 1.0), (1, 9.0)], ratio=1.5) == []
    assert slow_ranks([(0, 0.0), (0, 0.0)], ratio=1.5) == []


def test_ranks_that_share_cores_are_not_compared(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    platform = detect("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert shared_cores(platform, world_size=cores) is None
    assert f"{cores + 1} ranks of 1 thread(s) share {cores} core(s)" == shared_cores(platform, world_size=cores + 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
    assert shared_cores(platform, world_size=8 * cores) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert shared_cores(platform, world_size=8 * cores) is not None


def test_load_of_other_programs_is_noticed(monkeypatch):
    platform = detect("cpu")
    cores = platform.local_devices()
    for load, is_contended in ((1.4 * cores, False), (1.6 * cores, True)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert has_contended_cores(platform) == is_contended


@pytest.mark.parametrize(("load", "warnings"), [(0.0, 1), (1e6, 0)])
def test_a_slow_rank_of_a_busy_node_is_not_named(monkeypatch, caplog, load, warnings):
    """The last of three ranks of one stage took twice as long, as this rank, the first, gathers it."""
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(Marks, "read", lambda self: 1.0)
    topology = SimpleNamespace(stage=0, gather_to_main=lambda mine: [mine, mine, (0, 2 * mine[1], *mine[2:])])
    hook = StragglerHook(2, 1.5, Marks(), topology, detect("cpu"))
    with caplog.at_level("WARNING", logger="megadiff"):
        for step in (1, 2):
            hook(SimpleNamespace(step=step))
    assert len(caplog.messages) == warnings
    assert all("rank 2 (" in message for message in caplog.messages)


class Marks:
    """A stopwatch that keeps when it was asked to start and stop."""

    def __init__(self):
        self.seen = []

    def start(self):
        self.seen.append("start")

    def stop(self):
        self.seen.append("stop")

    def read(self):
        return 0.0


def test_only_computation_with_gradients_is_timed():
    """Evaluation, waiting for another stage and reducing gradients are not."""
    watch = Marks()
    timers = ComputeTimers(watch)
    for name in ("forward-compute", "forward-recv", "all-grads-sync", "backward-compute"):
        timers(name, log_level=2).start(barrier=False)
        timers(name).stop()
    assert watch.seen == ["start", "stop"] * 2
    with torch.no_grad():
        timers("forward-compute", log_level=2).start()
        timers("forward-compute").stop()
    assert watch.seen == ["start", "stop"] * 2


def test_a_cpu_rank_reads_wall_time_once():
    watch = stopwatch(detect("cpu"))
    watch.start()
    time.sleep(0.01)
    watch.stop()
    watch.stop()
    assert watch.read() >= 0.01
    assert watch.read() == 0.0
