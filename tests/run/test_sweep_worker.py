"""A worker that has trained a run is as it was after the run before: nothing adds up, and nothing stays open."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch

from megadiff.run.sweep_folder import plan_sweep, write_sweep
from tests.support.sweeps import write_description


def facts() -> dict[str, Any]:
    """Return the state of the process that one run could leave to the next."""
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return {
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)],
        "wakeup": wakeup,
        "handlers": [type(handler).__name__ for handler in logging.getLogger("megadiff").handlers],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "group": torch.distributed.is_initialized(),
        "random": torch.get_rng_state().sum().item(),
        "gradients": torch.is_grad_enabled(),
        "cwd": os.getcwd(),
    }


def _train_all(descriptions: list[Path], results: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    from megadiff.run.sweep_pool import train

    found = []
    for description in descriptions:
        ended = train(description)
        found.append((ended, facts()))
    results.put(found)


def test_a_run_leaves_nothing_behind(toy_corpus, tmp_path):
    """The third run finds what the second has found, whatever the first has loaded for good."""
    path = write_description(
        tmp_path, toy_corpus, noises=["masked", "next_token", "uniform"], sizes={"shapes": ["1x32x2"]},
        base={"log": {"every": 1, "tensorboard": True}},
    )  # fmt: skip
    plan = plan_sweep(path)
    write_sweep(plan)
    descriptions = [plan.folder / f"descriptions/{run.name}.yaml" for run in plan.runs]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_train_all, args=(descriptions, results))
    process.start()
    first, second, third = results.get(timeout=500)
    process.join()
    assert [ended for ended, _ in (first, second, third)] == [{"error": None, "code": 0}] * 3
    grown = third[1].pop("descriptors") - second[1].pop("descriptors")
    assert grown <= 4, "one group of gloo, whose number a worker's replacement bounds"
    assert second[1] == third[1]
    assert first[1]["signals"] == third[1]["signals"]
    assert "_heard_by_the_thread" not in str(third[1]["signals"])
    assert third[1]["wakeup"] == -1
    assert third[1]["handlers"] == ["_ConsoleHandler"]
    assert not third[1]["group"]
    assert third[1]["gradients"]
