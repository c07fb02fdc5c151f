"""Every loss weighting of the package keeps its contract, and the contract sees what it is for."""

from __future__ import annotations

import pytest

from megadiff.diffusion.config import WEIGHTINGS
from megadiff.errors import ConfigError
from megadiff.testing import check_weighting

NOISES = {
    "masked": {"shift": "masked"},
    "balanced": {"shift": "balanced", "schedule": "cosine"},
    "uniform": {"shift": "uniform"},
    "time": {"process": "gidd_time", "p_uniform": 0.2},
    "masked in time": {"process": "gidd_time"},
}
WRONG = {
    "writes": ("    terms.kl.data.mul_(2)\n    return terms.kl\n", "depends on the weighting"),
    "sums": ("    return terms.kl.sum()\n", "must have the shape of the tokens"),
    "doubles": ("    return terms.kl.double()\n", "must keep the dtype torch.float32"),
    "overflows": ("    return terms.cross_entropy / (terms.clean != terms.noised)\n", "the loss is not finite"),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", WEIGHTINGS.names())
def test_a_member_keeps_the_contract(name, noise):
    if name == "dynamic" and "time" not in noise:
        with pytest.raises(ConfigError, match=r"defined by the process gidd_time alone .* noise\.process is gidd_snr"):
            check_weighting(name, noise=NOISES[noise])
    else:
        check_weighting(name, noise=NOISES[noise], itakura_saito_weight=0.5)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_weighting_is_found(name, tmp_path, monkeypatch):
    body, message = WRONG[name]
    (tmp_path / f"wrong_weighting_{name}").mkdir()
    (tmp_path / f"wrong_weighting_{name}/weighting.py").write_text(f"def loss(terms, settings):\n{body}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=message):
        check_weighting(f"wrong_weighting_{name}.weighting")


@pytest.mark.parametrize("noise", NOISES)
def test_a_loss_that_weighs_kept_tokens_has_their_gradient(noise, tmp_path, monkeypatch):
    (tmp_path / "own_weighting").mkdir()
    (tmp_path / "own_weighting/divergence.py").write_text(
        "def loss(terms, settings):\n    return terms.itakura_saito\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check_weighting("own_weighting.divergence", noise=NOISES[noise])
