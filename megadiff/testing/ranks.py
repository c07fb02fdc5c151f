"""Run a function on several gloo ranks of this machine and bring back what each returned.

Ranks are forked: the parent has imported torch and megatron-core already, so a group of eight starts in
about two seconds instead of thirty. The parent must not have opened a process group.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any


def on_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 600.0, **kwargs: Any) -> list[Any]:
    """Call `fn(*args, **kwargs)` on `world_size` ranks with a gloo default group; return the results by rank.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or did not end in `timeout_s`.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, folder, queue, fn, args, kwargs), daemon=False)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        return _collect(ranks, queue, timeout_s)


def _rank_main(
    rank: int, world_size: int, folder: str, queue: Any, fn: Callable[..., Any], args: Any, kwargs: Any
) -> None:
    import torch

    gc.freeze()  # what the parent has imported; megatron-core collects garbage at every save and load
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        result = fn(*args, **kwargs)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        queue.put((rank, True, result))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))


def _collect(ranks: list[Any], queue: Any, timeout_s: float) -> list[Any]:
    import time

    results: dict[int, Any] = {}
    end = time.monotonic() + timeout_s
    try:
        while len(results) < len(ranks):
            if not queue.empty():
                rank, ok, value = queue.get()
                assert ok, f"rank {rank} raised:\n{value}"
                results[rank] = value
                continue
            dead = [i for i, p in enumerate(ranks) if not p.is_alive() and p.exitcode != 0]
            assert not dead, f"rank(s) {dead} died with exit code {[ranks[i].exitcode for i in dead]}"
            assert time.monotonic() < end, (
                f"ranks did not end in {timeout_s} s; missing {set(range(len(ranks))) - set(results)}"
            )
            time.sleep(0.01)
        for process in ranks:
            process.join(10)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(len(ranks))]
