from __future__ import annotations

import time

import pytest
import torch

from megadiff.platform.machine import detect, stopwatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU; torch sees none here"),
]


def test_a_stretch_of_the_stream_is_timed_without_waiting_for_it():
    """The host runs ahead: a stretch that the device has not finished is counted by a later reading, once."""
    platform = detect("cuda")
    watch = stopwatch(platform)
    started = time.perf_counter()
    watch.start()
    torch.cuda._sleep(500_000_000)  # cycles: 0.2 s and more at the clocks of today
    watch.stop()
    early = watch.read()
    assert time.perf_counter() - started < 0.1
    assert early == 0.0
    platform.synchronize()
    assert 0.1 < watch.read() < 5.0
    assert watch.read() == 0.0
