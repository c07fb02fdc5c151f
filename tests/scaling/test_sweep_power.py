"""A sweep's dry run predicts what its own simulated sweeps find, and a design that does as well for less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megadiff.scaling.isoflop import isoflop
from megadiff.scaling.laws import published
from megadiff.scaling.power import Power, design_of, predict, surface_of, sweep_power
from megadiff.scaling.sweep_runs import expand
from tests.scaling.test_sweep import BASE, described

BUDGETS = [float(f"{5e17 * 2.115**k:.3g}") for k in range(9)]
SWEEP = described(
    sizes={"range": {"smallest": 1.2e8, "largest": 1.6e10, "factor": 1.5}}, budgets={"flops": BUDGETS, "within": 6}
)
RUNS = expand(SWEEP, BASE, published()).runs


def test_predicted_errors_are_those_of_50_sweeps_of_these_runs():
    """Each run has a luck of its own that all its budgets share, and the fit is that of `fit_scaling`."""
    surface = surface_of(published(), "masked", SWEEP)
    assert surface is not None
    design = design_of(RUNS, "masked", 0.001)
    own = [run for run in RUNS if run.noise == "masked"]
    found = []
    for seed in range(50):
        draw = np.random.default_rng(seed)
        points = []
        for run in own:
            luck = 0.001 * draw.standard_normal()
            losses = surface(np.array(run.flops_per_token), np.array(run.budgets) / run.flops_per_token)
            points += [
                (c, run.flops_per_token, y * np.exp(luck), run.name) for c, y in zip(run.budgets, losses, strict=True)
            ]
        flops, sizes, losses, names = zip(*points, strict=True)
        found.append(isoflop(flops, sizes, losses, names, draws=0).laws["flops_per_token"].exponent)
    predicted = predict(design, surface, draws=1000)
    assert predicted.standard_errors["flops_per_token"] == pytest.approx(np.std(found, ddof=1), rel=0.2)
    assert predicted.exponents["flops_per_token"] == pytest.approx(0.56629)
    assert predicted.runs == len(own)
    assert predicted.flops == pytest.approx(sum(run.budgets[-1] for run in own))


def test_more_seeds_make_a_sweep_surer_and_a_grid_cheaper():
    power = sweep_power(SWEEP, RUNS, published(), run_noise=0.001, draws=100)
    thrice = [replace(run, seed=seed) for run in RUNS for seed in range(3)]
    surer = sweep_power(SWEEP, thrice, published(), run_noise=0.001, draws=100)
    one, other = power.by_noise["masked"], surer.by_noise["masked"]
    assert isinstance(one, Power)
    assert isinstance(other, Power)
    ratio = other.standard_errors["flops_per_token"] / one.standard_errors["flops_per_token"]
    assert ratio == pytest.approx(3**-0.5, rel=0.25)
    assert surer.apart["masked", "uniform"] >= power.apart["masked", "uniform"]
    assert "% of the FLOPs" in power.cheaper


def test_a_noise_without_laws_has_no_prediction():
    sweep = described(noises=["next_token"])
    power = sweep_power(sweep, expand(sweep, BASE, published()).runs, published(), run_noise=0.001, draws=50)
    assert power.by_noise == {"next_token": "no law file knows its loss; name one of your own under `laws`"}
    assert (power.apart, power.cheaper) == ({}, "")
