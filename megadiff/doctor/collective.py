"""A short-lived process group on this node, whose ranks sum a number."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import time
from typing import Any

import torch
from torch import distributed

from megadiff.platform.machine import Platform, detect

TIMEOUT_S = 40.0


def try_all_reduce(platform: Platform, ranks: int) -> float:
    """Open a group of `ranks` processes of this node and sum over it; return the seconds that took.

    On CPU the processes are forked, which is fast; a forked process cannot use a GPU, so there they are spawned.

    Raises:
        RuntimeError: a rank failed or did not finish in time; the text is the message of the first one that failed.
    """
    context: Any = multiprocessing.get_context("fork" if platform.is_cpu else "spawn")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answers = context.Queue()
        group = [
            context.Process(
                target=_rank, args=(platform.kind, rank, ranks, f"file://{folder}/store", answers), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in group:
            process.start()
        try:
            for _ in group:
                complaint = _first_answer(answers, group, start + TIMEOUT_S)
                if complaint:
                    raise RuntimeError(complaint)
        finally:
            for process in group:
                process.kill()
                process.join(5)
    return time.monotonic() - start


def _first_answer(answers: Any, group: list[Any], end: float) -> str:
    while time.monotonic() < end:
        try:
            return answers.get(timeout=0.2)
        except queue.Empty:
            dead = [process.exitcode for process in group if process.exitcode]
            if dead:
                return f"a rank died with exit code {dead[0]}"
    return f"no answer in {TIMEOUT_S:.0f} s"


def _rank(kind: Any, rank: int, ranks: int, store: str, answers: Any) -> None:
    """Join the group and put "" into the queue if the sum is right, otherwise a description of the error."""
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        torch.set_num_threads(1)
        machine = detect(kind)
        distributed.init_process_group(machine.backend, init_method=store, rank=rank, world_size=ranks)
        value = torch.tensor([rank + 1.0], device=machine.device)
        distributed.all_reduce(value)
        wanted = ranks * (ranks + 1) / 2
        answers.put("" if value.item() == wanted else f"the sum is {value.item()} instead of {wanted}")
        distributed.destroy_process_group()
    except Exception as error:
        lines = str(error).strip().splitlines()
        answers.put(f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}")
