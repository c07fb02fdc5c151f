"""Elementary functions: as accurate as the library's, and made of exact operations alone."""

from __future__ import annotations

import numpy as np

from megadiff.diffusion import exact


def test_they_agree_with_the_library_to_a_few_last_places():
    x = np.linspace(-60, 60, 20001)
    np.testing.assert_allclose(exact.exp(x), np.exp(x), rtol=1e-15)
    np.testing.assert_allclose(exact.sigmoid(x), 1 / (1 + np.exp(-x)), rtol=2e-15)
    np.testing.assert_allclose(exact.log(np.exp(x)), x, rtol=1e-15, atol=2e-16)
    y = np.exp(np.linspace(-30, 20, 2001))
    np.testing.assert_allclose(exact.atan(y), np.arctan(y), rtol=2e-15)
    t = np.linspace(1e-4, 1 - 1e-4, 2001)
    np.testing.assert_allclose(exact.log_tan_half_pi(t), np.log(np.tan(np.pi * t / 2)), rtol=1e-11, atol=1e-12)


def test_far_ends_stay_finite():
    assert 0 < exact.sigmoid(-1e6) < 1e-300
    assert exact.sigmoid(1e6) == 1
    assert exact.sigmoid(-1000.0) < 2.0**-33


def test_scalars_and_slices_give_the_same_bits_as_whole_arrays():
    x = np.random.default_rng(0).uniform(-9, 9, 257)
    for function in (exact.exp, exact.sigmoid):
        whole = function(x)
        assert all(function(value) == want for value, want in zip(x, whole, strict=True))
        assert (function(x[1::3]) == whole[1::3]).all()
