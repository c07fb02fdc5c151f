"""Worker processes that tokenize: started without Ctrl-C, and ended with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

CONTEXT = multiprocessing.get_context("spawn")
"""Way of starting them: forked children would share the locks of the tokenizer library's threads and of open files."""


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Start processes without SIGINT: they never see Ctrl-C, not even during imports; this process sees it afterwards.

    Ctrl-C reaches all processes of a terminal, but only the first process should end the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """Set a worker process up: it uses one thread of the tokenizer library, and ends when its parent does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are already parallel
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent exits: a worker holds both ends of its queue and would otherwise wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
