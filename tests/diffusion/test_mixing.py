"""The mixing distribution: shares, derivative, closed-form weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.diffusion.config import noise_config
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import build_process
from megadiff.errors import ConfigError
from tests.diffusion.dense import f64

levels, shifts, scales = st.floats(-9, 9), st.floats(-30, 30), st.floats(0.01, 1.0)


@settings(max_examples=80, deadline=None)
@given(lam=levels, b=shifts, a=scales, mask=st.integers(0, 6))
def test_weights_follow_their_definition(lam, b, a, mask):
    process, at = HybridMixing(7, mask, b, a), f64(lam)
    pi, slope = process.pi(at)[0], process.pi_prime(at)[0]
    clean = (mask + 1) % 7
    noised = torch.arange(7)
    weight = process.weight(at.expand(7), torch.full((7,), clean), noised)
    denominator = pi + torch.exp(at) * (noised == clean)
    torch.testing.assert_close(weight * denominator, pi - slope, rtol=1e-10, atol=1e-14)
    assert bool((weight >= 0).all())
    assert bool((weight <= 1 + a + 1e-12).all())
    assert float(pi.sum()) == pytest.approx(1, abs=1e-12)
    assert float(slope.sum()) == pytest.approx(0, abs=1e-12)
    q = process.marginal(torch.eye(7, dtype=torch.float64)[clean][None], at)[0]
    assert float((q * weight).sum()) == pytest.approx(float(torch.sigmoid(-at)), rel=1e-10)
    torch.testing.assert_close(process.pi_at(at.expand(7), noised), pi)


@settings(max_examples=40, deadline=None)
@given(lam=levels, b=st.floats(-8, 8), a=scales)
def test_the_derivative_is_that_of_the_distribution(lam, b, a):
    at = f64(lam).requires_grad_()
    process = HybridMixing(5, 0, b, a)
    for v in range(5):
        (grad,) = torch.autograd.grad(process.pi(at)[0, v], at)
        assert float(grad) == pytest.approx(float(process.pi_prime(at.detach())[0, v]), rel=1e-8, abs=1e-14)


def test_the_limits_are_exact_in_both_precisions():
    for dtype in (torch.float32, torch.float64):
        lam = torch.linspace(-9, 9, 7, dtype=dtype)
        masked, uniform = HybridMixing(5, 3, -1000), HybridMixing(5, 3, 1000)
        assert masked.is_masked_limit
        assert not masked.is_uniform_limit
        assert uniform.is_uniform_limit
        assert not uniform.is_masked_limit
        assert bool((masked.pi(lam)[:, 3] == 1).all())
        assert bool((masked.uniform_prob(lam) == 0).all())
        assert bool((uniform.pi(lam)[:, 3] == 0).all())
        assert bool((uniform.uniform_prob(lam) == 1).all())
        assert masked.log_u(lam)[0] == -1009


def test_small_uniform_shares_keep_their_weight_at_a_large_vocabulary():
    """The released code clips a denominator at 1e-8 here, which is 1e3 times the true one."""
    weight = HybridMixing(131072, 3, -2.0).weight(f64(-9.0), torch.tensor([5]), torch.tensor([7]))
    assert float(weight) == pytest.approx(float(torch.sigmoid(f64(-11.0))), rel=1e-12)


def test_the_exact_share_agrees_with_the_tensor_one():
    process, lam = HybridMixing(5, 3, 0.7, 0.4), f64(-9, -1, 0, 3, 9)
    torch.testing.assert_close(
        torch.from_numpy(process.exact_uniform_prob(lam.numpy())), process.uniform_prob(lam), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("scale", [1.001, 2.0, 0.0, -1.0])
def test_a_scale_outside_its_range_is_refused_with_the_reason(scale):
    with pytest.raises(ConfigError, match=r"scale must lie in \(0, 1\].*negative"):
        HybridMixing(5, 3, 0.0, scale)


def test_a_mask_outside_the_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="got mask id 5 of 5"):
        HybridMixing(5, 5, 0.0)


def test_a_run_description_makes_a_process():
    assert build_process(noise_config(shift="low_uniform", scale=0.5), vocab_size=9, mask_id=3) == HybridMixing(
        9, 3, -2.0, 0.5
    )
