"""Run a function in a forked child, so that a signal, a full memory or a side effect is seen and stays there."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any


def in_child(fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> Any:
    """What `fn(*args)` returned there.

    Raises:
        AssertionError: it raised (its traceback is the message), ended by a signal or otherwise, or took too long.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_main, args=(theirs, fn, args))
    child.start()
    theirs.close()
    try:
        assert ours.poll(timeout_s), f"the child did not answer within {timeout_s} s"
        is_done, value = ours.recv()
    except EOFError:
        child.join(10)
        raise AssertionError(f"the child ended with exit code {child.exitcode} and no answer") from None
    finally:
        if child.is_alive():
            child.join(2)
            child.kill()
        child.join()
    assert is_done, f"the child raised:\n{value}"
    return value


def _main(pipe: Any, fn: Callable[..., Any], args: Any) -> None:
    try:
        answer = (True, fn(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    os._exit(0)
