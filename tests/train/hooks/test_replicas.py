from __future__ import annotations

import pytest
import torch

from megadiff.train.hooks import replicas
from megadiff.train.hooks.replicas import bit_hash


def flipped(weights, place, bit):
    """The same but for one bit."""
    other = weights.clone()
    integers = {2: torch.int16, 4: torch.int32}[weights.element_size()]
    mask = torch.tensor(1, dtype=torch.int64) << bit
    other.view(-1).view(integers)[place] ^= mask.to(integers)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_single_flipped_bit_changes_the_hash(dtype):
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    own = int(bit_hash(weights))
    found = {int(bit_hash(flipped(weights, i, bit))) for i in range(15) for bit in range(8 * weights.element_size())}
    assert own not in found
    assert len(found) == 15 * 8 * weights.element_size()


def test_it_hears_of_order_signs_of_zero_and_the_kind_of_nan():
    values = torch.tensor([1.0, 2.0, 0.0, float("nan")])
    own = int(bit_hash(values))
    assert own == int(bit_hash(values.clone()))
    assert own != int(bit_hash(values[[1, 0, 2, 3]]))
    assert own != int(bit_hash(torch.tensor([1.0, 2.0, -0.0, float("nan")])))
    assert own != int(bit_hash(flipped(values, 3, 3)))


def test_chunks_and_strides_do_not_matter(monkeypatch):
    weights = torch.randn(7, 11, generator=torch.Generator().manual_seed(1))
    own = int(bit_hash(weights))
    for chunk in (1, 10, 76, 77, 78):
        monkeypatch.setattr(replicas, "_CHUNK", chunk)
        assert int(bit_hash(weights)) == own
    assert int(bit_hash(weights.t().contiguous().t())) == own


def test_weights_are_left_as_they_are():
    weights = torch.nn.Parameter(torch.arange(6.0))
    bit_hash(weights)
    assert weights.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert weights.grad is None
