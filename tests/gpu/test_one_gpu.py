"""What the GPU tests train with works on the device at hand, so that it does not go stale where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import needs
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or needs.IS_REHEARSED,
    reason="the other tests of this folder train with it, in a process that cannot be forked then",
)


def _losses(block: str, cut: dict[str, bool]) -> tuple[list[float], int, tuple[int, ...]]:
    from tests.gpu.one_gpu import GIDD, PLAIN, trainee

    trained = trainee({"plain": PLAIN, "gidd": GIDD}[block], parallel=cut)
    losses = [loss for loss, norm in trained.train(range(8)) if norm > 0]
    return losses, len(trained.weights()), tuple(trained.logits().shape)


@pytest.mark.parametrize(("block", "cut"), [("plain", {"distributed_optimizer": True}), ("gidd", {})])
def test_it_learns(block, cut):
    (found,) = on_ranks(1, _losses, block, cut)
    losses, weights, shape = found
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.3
    assert weights > 20
    assert len(shape) == 3
