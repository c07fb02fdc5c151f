"""One thread per process, as `make test` sets it, Ctrl-C as a terminal has it, checks of shapes, common fixtures."""

from __future__ import annotations

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.support import shapes
from tests.support.cuda_build import imitate_where_asked

imitate_where_asked()
LONG = ("distributed", "docs", "end_to_end", "testing", "tools")
"""Folders with files that take a minute or more each."""
CHECKS_SHAPES = os.environ.get("MEGADIFF_CHECK_SHAPES") == "1"
gc.disable()  # until the tests are collected: what is imported stays, and the collector would walk through it again
if CHECKS_SHAPES:  # before anything imports the modules, so for whole runs of pytest
    shapes.install()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `&` and nohup make all children ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # ranks are forked from here; a thread pool would not survive that


def pytest_collection_modifyitems(items):
    """Begin with the folders whose files take longest, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


def pytest_collection_finish():
    if CHECKS_SHAPES:
        shapes.check_named_tuples()
    gc.collect()
    gc.enable()
    gc.freeze()  # modules and tests stay; no collection here or in a forked rank has to walk through them again


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory):
    """Prefix of a small indexed corpus of the byte tokenizer."""
    from tests.support.runs import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "toy")
