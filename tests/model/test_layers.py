"""Norms of the layers: over a head, over all heads, and over shards of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.ranks import on_ranks
from tests.support.toy_model import model_config  # noqa: F401  imports megatron-core quietly, before what follows

from megadiff.model.layers import AllHeadsRMSNorm, RMSNorm  # isort: skip

SEQUENCE, BATCH, HEADS, WIDTH = 5, 3, 4, 6


def settings(tensor=1, dtype=torch.float32):
    return SimpleNamespace(
        params_dtype=dtype, sequence_parallel=False, num_attention_heads=HEADS, tensor_model_parallel_size=tensor
    )


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def formula(x, offset, eps):
    """x / sqrt(mean(x^2) + eps) * (1 + g) over the last dimension, float64."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + offset)


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm_is_its_formula_with_the_gain_as_an_offset(eps):
    norm = RMSNorm(settings(), 7, eps=eps)
    assert not norm.weight.any()
    x, offset = drawn(SEQUENCE, BATCH, 7), drawn(7, seed=1)
    norm.weight.data = torch.from_numpy(offset).float()
    found = norm(torch.from_numpy(x).float())
    np.testing.assert_allclose(found.detach().numpy(), formula(x, offset, eps), rtol=2e-6, atol=1e-6)


def test_rms_norm_computes_in_float32_and_returns_the_inputs_type():
    """In bf16 the sum of 4096 squares would stall at 256."""
    norm = RMSNorm(settings(dtype=torch.bfloat16), 4096)
    found = norm(torch.full((1, 4096), 3.0, dtype=torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.ones(1, 4096, dtype=torch.bfloat16))


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_all_heads_norm_takes_one_statistic_over_all_heads(eps):
    norm = AllHeadsRMSNorm(settings(), WIDTH, eps=eps, heads=HEADS)
    x, offset = drawn(SEQUENCE, BATCH, HEADS, WIDTH), drawn(HEADS * WIDTH, seed=1)
    norm.weight.data = torch.from_numpy(offset).float()
    found = norm(torch.from_numpy(x).float())
    wanted = formula(x.reshape(SEQUENCE, BATCH, -1), offset, eps).reshape(x.shape)
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=2e-6, atol=1e-6)
    assert norm(torch.from_numpy(x).bfloat16()).dtype == torch.bfloat16


def _all_heads_on_rank(x, offset, upstream, tensor):
    """Output and gradients of this rank's heads."""
    from megadiff.parallel.config import Layout
    from megadiff.parallel.topology import open_topology

    rank = open_topology(Layout(tensor, 1, 1, 1, 1)).tensor_rank
    heads = slice(rank * HEADS // tensor, (rank + 1) * HEADS // tensor)
    norm = AllHeadsRMSNorm(settings(tensor), WIDTH, heads=HEADS)
    norm.weight.data = torch.from_numpy(offset.reshape(HEADS, WIDTH)[heads].reshape(-1)).float()
    local = torch.from_numpy(x[:, :, heads]).float().requires_grad_()
    out = norm(local)
    out.backward(torch.from_numpy(upstream[:, :, heads]).float())
    return out.detach().numpy(), local.grad.numpy(), norm.weight.grad.numpy().reshape(-1, WIDTH)


def test_all_heads_norm_on_two_ranks_equals_that_on_one():
    shape = (SEQUENCE, BATCH, HEADS, WIDTH)
    arguments = (drawn(*shape), drawn(HEADS * WIDTH, seed=1), drawn(*shape, seed=2))
    one = on_ranks(1, _all_heads_on_rank, *arguments, 1)[0]
    two = on_ranks(2, _all_heads_on_rank, *arguments, 2)
    for part, axis in enumerate((2, 2, 0)):
        np.testing.assert_allclose(np.concatenate([rank[part] for rank in two], axis), one[part], rtol=1e-5, atol=1e-6)
