from __future__ import annotations

from megadiff.platform.machine import LAUNCH_QUEUES, order_launches


def test_tensor_ranks_order_their_launches_where_nothing_is_set():
    environ: dict[str, str] = {}
    said = order_launches(tensor_ranks=2, environ=environ)
    assert environ == {LAUNCH_QUEUES: "1"}
    assert said is not None
    assert said.startswith("CUDA_DEVICE_MAX_CONNECTIONS was not set and is 1 now")


def test_a_value_that_is_set_stays_and_is_warned_of():
    environ = {LAUNCH_QUEUES: "8"}
    said = order_launches(tensor_ranks=2, environ=environ)
    assert environ == {LAUNCH_QUEUES: "8"}
    assert said is not None
    assert said.startswith("CUDA_DEVICE_MAX_CONNECTIONS is 8: tensor-parallel communication may wait")
    assert order_launches(tensor_ranks=2, environ={LAUNCH_QUEUES: "1"}) is None


def test_one_tensor_rank_leaves_the_environment_alone():
    environ: dict[str, str] = {}
    assert order_launches(tensor_ranks=1, environ=environ) is None
    assert environ == {}
