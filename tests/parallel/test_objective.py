"""The ELBO of a training line has one definition, whatever law its noise levels are drawn from."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch

from megadiff.diffusion.config import ConditioningConfig, noise_config
from megadiff.diffusion.noise_process import build_process
from megadiff.diffusion.noising import noise_batch
from megadiff.parallel.config import Layout
from megadiff.parallel.step_metrics import metrics_of
from megadiff.platform.quiet import quiet
from tests.diffusion.dense import gauss, over_z
from tests.support.ranks import on_ranks

with quiet():
    from megadiff.parallel.objective import DiffusionObjective, ShardedObjective
    from megadiff.parallel.topology import open_topology

VOCAB, MASK, LENGTH, BATCH, BATCHES = 11, 3, 64, 256, 20
LOGITS = torch.linspace(-1.0, 1.0, VOCAB, dtype=torch.float64)
ENDS = {"min_log_snr": -4.0, "max_log_snr": 4.0}
"""Near ends: the mass that a schedule loses beyond them is 4 % (linear) and 17 % (cosine), and weights stay small."""
NOISES: dict[str, dict] = {
    "linear": {"schedule": "linear", **ENDS},
    "cosine": {"schedule": "cosine", **ENDS},
    "uniform in log-SNR": {"schedule": "uniform", **ENDS},
    "lopsided cosine": {"schedule": "cosine", "min_log_snr": -4.0, "max_log_snr": 2.0},
    "time": {"process": "gidd_time", "p_uniform": 0.3, "time_eps": 0.02},
}
CONDITIONINGS: dict[str, dict] = {
    "isotropic": {},
    "independent": {"per_token_noise": 1.0},
    "rising": {"linear_noise": 1.0},
}
CASES = [
    *((noise, "isotropic") for noise in NOISES),
    *((noise, "independent") for noise in ("cosine", "uniform in log-SNR")),
    *((noise, "rising") for noise in ("linear", "cosine", "uniform in log-SNR")),
]


def _printed(cases: list[tuple[str, str]]) -> dict[tuple[str, str], list[dict]]:
    """Metrics of several batches of each case, for a model that predicts LOGITS everywhere."""
    topology = open_topology(Layout(1, 1, 1, 1, 1))
    clean = np.random.default_rng(0).choice(np.delete(np.arange(VOCAB), MASK), size=(BATCH, LENGTH))
    hidden, weight = torch.ones(LENGTH, BATCH, 1), LOGITS.float()[:, None]
    found = {}
    for noise, conditioning in cases:
        process = build_process(noise_config(**NOISES[noise]), vocab_size=VOCAB, mask_id=MASK)
        objective = ShardedObjective(DiffusionObjective(process), topology)
        lines = []
        for batch in range(BATCHES):  # independent ones
            first = batch * BATCH
            sequences = noise_batch(
                clean, seed=7, sample_index=np.arange(first, first + BATCH), process=process,
                conditioning=ConditioningConfig.model_validate(CONDITIONINGS[conditioning]), global_batch=BATCH,
            )  # fmt: skip
            placed = objective.place(sequences, torch.device("cpu"))
            _, _, sums = objective.report(objective.loss_fn(placed)(hidden, weight), placed)
            lines.append(metrics_of(sums.tolist()))
        found[noise, conditioning] = lines
    return found


@pytest.fixture(scope="module")
def printed():
    return on_ranks(1, _printed, CASES)[0]


@cache
def by_quadrature(noise: str) -> float:
    """The integral over the schedule's own interval, divided by the linear schedule's mass on it; float64."""
    process = build_process(noise_config(**NOISES[noise]), vocab_size=VOCAB, mask_id=MASK)
    schedule = process.schedule
    nodes, weights = gauss(schedule.min_log_snr, schedule.max_log_snr)
    clean = np.random.default_rng(0).choice(np.delete(np.arange(VOCAB), MASK), size=(BATCH, LENGTH))
    share = np.bincount(clean.ravel(), minlength=VOCAB) / clean.size
    total = 0.0
    for x in range(VOCAB):
        if x != MASK:
            terms, q = over_z(LOGITS, x, nodes, process)
            total += share[x] * float((weights * (q * terms.loss).sum(-1)).sum())
    ends = [1.0 / (1.0 + math.exp(-end)) for end in (schedule.min_log_snr, schedule.max_log_snr)]
    return total / (ends[1] - ends[0])


@pytest.mark.parametrize(("noise", "conditioning"), CASES)
def test_the_elbo_is_the_same_for_every_schedule_and_noise_pattern(printed, noise, conditioning):
    values = np.array([line["elbo"] for line in printed[noise, conditioning]])
    error = values.std(ddof=1) / math.sqrt(BATCHES)
    wanted = by_quadrature(noise)
    assert error < 0.01 * wanted, "too noisy to see a wrong density"
    # A rising sequence's levels are a fixed grid of LENGTH points; their sum differs a little from the integral.
    grid = 0.015 * wanted if conditioning == "rising" else 0.0
    assert abs(values.mean() - wanted) <= 4 * error + grid


def test_schedules_on_one_interval_agree():
    values = [by_quadrature(noise) for noise in ("linear", "cosine", "uniform in log-SNR")]
    assert values == pytest.approx([values[0]] * 3, rel=1e-14)


@pytest.mark.parametrize("conditioning", ["isotropic", "rising"])
def test_what_is_minimised_does_not_depend_on_how_the_elbo_is_reported(printed, conditioning):
    """`loss` is w (KL + IS) itself: for the linear schedule its mean is an integral against alpha beta."""
    line = printed["linear", conditioning][0]
    assert line["loss"] == pytest.approx(line["kl"] + line["itakura_saito"], rel=1e-6)
