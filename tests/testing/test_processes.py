"""Every noise process of the package keeps its contract, and the contract sees what it is for."""

from __future__ import annotations

import pytest

from megadiff.diffusion.config import PROCESSES
from megadiff.testing import check_process

SETTINGS = {
    "gidd_snr": [
        {"shift": "masked"},
        {"shift": "balanced", "schedule": "cosine"},
        {"shift": "high_uniform", "scale": 0.5, "min_log_snr": -7},
        {"shift": "uniform", "schedule": "uniform"},
    ],
    "gidd_time": [{}, {"p_uniform": 0.2}, {"p_uniform": 0.3, "gamma": 1.7, "time_eps": 1e-3}],
}

HEADER = """
from dataclasses import dataclass
from megadiff.diffusion.config import ScheduledNoise
from megadiff.diffusion.processes import NoiseLaw

class Settings(ScheduledNoise):
    pass

"""
WRONG = {
    "slope": (
        "        return 0.5 * log_snr\n",
        "        return 0.4\n",
        "dlogit_u is not the derivative of logit_u",
    ),
    "steep": ("        return 2.0 * log_snr\n", "        return 2.0\n", "a negative rate, at log_snr"),
    "falling": ("        return -0.5 * log_snr\n", "        return -0.5\n", "dlogit_u must be at least 0"),
    "own_functions": (
        "        import math\n        return math.pi + 0 * log_snr if functions.__name__ == 'torch' else 0 * log_snr\n",
        "        return 0.0\n",
        "of tensors .* and of exact arrays differ",
    ),
}


@pytest.mark.parametrize(("name", "settings"), [(name, one) for name, all_ in SETTINGS.items() for one in all_])
def test_a_member_keeps_the_contract(name, settings):
    check_process(name, **settings)


def test_every_member_is_under_contract():
    assert sorted(SETTINGS) == PROCESSES.names()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_process_is_found(name, tmp_path, monkeypatch):
    logit, slope, message = WRONG[name]
    text = (
        f"{HEADER}@dataclass(frozen=True)\nclass Law(NoiseLaw):\n    def logit_u(self, log_snr, functions):\n{logit}\n"
        f"    def dlogit_u(self, log_snr, functions):\n{slope}\n\ndef build(settings):\n    return Law()\n"
    )
    (tmp_path / f"wrong_noise_{name}").mkdir()
    (tmp_path / f"wrong_noise_{name}/noise.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match=message):
        check_process(f"wrong_noise_{name}.noise")
