"""Schedules of the noise level: quantile, density and mass belong together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megadiff.diffusion.config import noise_config
from megadiff.diffusion.noise_process import build_schedule
from megadiff.diffusion.schedules import LINEAR, SCHEDULES, CosineSchedule, LinearSchedule
from megadiff.errors import ConfigError
from tests.diffusion.dense import Z_LINEAR, gauss


@pytest.mark.parametrize("rate", SCHEDULES)
@pytest.mark.parametrize("ends", [(-9.0, 9.0), (-4.0, 7.0)])
def test_the_quantile_inverts_the_integral_of_the_density(rate, ends):
    law = SCHEDULES[rate](*ends)
    nodes, weights = gauss(*ends)
    assert float((weights * law.density(nodes)).sum()) == pytest.approx(law.mass, rel=1e-12)
    for u in (0.0, 0.013, 0.25, 0.5, 0.9, 1.0):
        lam = float(law.log_snr(u))
        nodes, weights = gauss(lam, ends[1])
        assert float((weights * law.normalised_density(nodes)).sum()) == pytest.approx(u, abs=1e-12)
    assert law.log_snr([0, 1]).tolist() == pytest.approx([ends[1], ends[0]], abs=1e-11)
    assert (np.diff(law.log_snr(np.linspace(0, 1, 999))) < 0).all()


def test_the_linear_rate_is_the_papers():
    assert LINEAR.mass == pytest.approx(Z_LINEAR, rel=1e-14)
    assert float(LINEAR.log_snr(0.5)) == pytest.approx(0, abs=1e-15)
    t = torch.sigmoid(-torch.from_numpy(LINEAR.log_snr([0.1, 0.2, 0.3])))
    assert float(t[2] - t[1]) == pytest.approx(float(t[1] - t[0]), rel=1e-12)


def test_the_cosine_rate_is_even_in_t():
    alpha = torch.sigmoid(torch.from_numpy(CosineSchedule(-30, 30).log_snr([0.25, 0.5, 0.75])))
    want = torch.cos(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64) * torch.pi / 2) ** 2
    torch.testing.assert_close(alpha, want, rtol=1e-5, atol=1e-6)


def test_levels_out_of_order_are_refused():
    with pytest.raises(ConfigError, match="min_log_snr < max_log_snr"):
        LinearSchedule(3.0, -3.0)


def test_a_run_description_names_its_schedule():
    schedule = build_schedule(noise_config(schedule="cosine", min_log_snr=-5))
    assert schedule == CosineSchedule(-5.0, 9.0)
