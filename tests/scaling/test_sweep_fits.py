"""Fits of whole sweeps with planted laws: batch and rate, hyperbolas, cooldowns, repeated data, and their law file."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest

from megadiff.report.fit_page import fit_page
from megadiff.scaling import figures
from megadiff.scaling.batch_laws import batch_laws, steps_to
from megadiff.scaling.figures import draw_all
from megadiff.scaling.fit_record import law_file, record, summary, written_laws
from megadiff.scaling.fit_results import fit_points
from megadiff.scaling.laws import LawBook, published, read_law_file, write_law_file
from megadiff.scaling.planner import Goal, plan
from megadiff.scaling.points import (
    BEATEN,
    Branch,
    Gathered,
    Point,
    best_of_settings,
    from_csv,
    without_highest,
    without_repeats,
)
from megadiff.scaling.run_curves import NoiseScale
from tests.scaling.planted import BUDGETS, MASKED, SIZES

BATCHES = tuple(2.0**step for step in range(13, 24))
G = 0.25


def wasted(ratio):
    """Tokens over the fewest at this multiple of the best batch, on a hyperbola with exponent G."""
    inside = 2 * ratio**G - 1
    return np.inf if inside <= 0 else ratio**2 / inside ** (1 / G)


def best_batch(tokens):
    return 10**-2.4 * tokens**0.8225


def grid_of_batches(sizes=SIZES[2:7:2], budgets=BUDGETS[::2], rates=(0.5, 0.71, 1.0, 1.41, 2.0), luck=0.0):
    """Points of a sweep over batch and rate: tokens beyond the best batch are worth less, and rates are too."""
    rng = np.random.default_rng(0)
    for size in sizes:
        for batch in BATCHES:
            for factor in rates:
                run = f"{size:.3g}-{batch:g}-{factor}"
                own = math.exp(luck * rng.standard_normal())
                for flops in budgets:
                    tokens = flops / size
                    worth = tokens / wasted(batch / best_batch(tokens))
                    loss = float(MASKED(np.float64(size), np.float64(worth))) if worth > 1e6 else 11.0
                    loss *= own * (1 + 0.01 * math.log(factor) ** 2)
                    rate = 10**-2.06 * batch**0.3412 * factor
                    yield Point(run, "masked", flops, size, tokens, loss, None, size / 7.3, batch, rate)


def gathered(points, **more):
    points = tuple(best_of_settings(without_repeats(list(points))))
    return Gathered(points, (), "deepseek", "planted points", len({point.run for point in points}), **more)


def test_planted_batch_and_rate_laws_come_back_with_one_slope():
    found = batch_laws(list(grid_of_batches(luck=0.0002)))
    assert len({cell.size for cell in found.cells}) == 3
    law = found.batch["vertex"].pooled
    assert law.exponent == pytest.approx(0.8225, abs=0.04)
    assert found.batch["vertex"].p_value > 0.01
    assert set(found.batch["vertex"].by) == {cell.size for cell in found.cells}
    rate = found.rate["vertex"].pooled
    assert rate.exponent == pytest.approx(0.3412, abs=0.03)
    spread = {name: np.std([math.log(getattr(cell, name) / best_batch(cell.tokens)) for cell in found.cells])
              for name in ("batch", "batch_vertex")}  # fmt: skip
    assert spread["batch_vertex"] < spread["batch"]


def test_iso_loss_crossings_give_the_planted_hyperbola_and_critical_batch():
    tokens, best, size = 5e9, 3e5, 9e8
    points = []
    for batch in BATCHES[2:]:
        for flops in np.geomspace(size * tokens / 30, size * tokens * 30, 60):
            worth = flops / size / wasted(batch / best)
            if 0 < worth < np.inf:
                loss = float(MASKED(np.float64(size), np.float64(worth)))
                points.append(Point(f"{batch}", "masked", flops, size, flops / size, loss, batch_tokens=batch))
    found = batch_laws(points)
    assert len(found.iso_losses) == 5
    for each in found.iso_losses:
        assert each.fit.estimates["b_opt"] == pytest.approx(best, rel=0.05)
        assert each.fit.estimates["g"] == pytest.approx(G, rel=0.1)
        assert each.fit.is_inside
        beyond = each.fit.estimates["critical_batch"] / best
        assert wasted(beyond) == pytest.approx(1.2, rel=0.02)
    assert found.token_optimal.exponent == pytest.approx(0, abs=0.05)


def test_steps_to_a_loss_are_interpolated_and_never_extrapolated():
    curves = {
        (8.0, 0.1): [(0.0, 2.0), (1.0, 1.0)],
        (8.0, 0.2): [(0.0, 2.0), (2.0, 1.0)],
        (16.0, 0.1): [(0.0, 1.2), (1.0, 1.1)],
    }
    assert steps_to(curves, math.exp(1.5)) == {8.0: pytest.approx(math.exp(0.5))}
    assert steps_to(curves, math.exp(1.15)) == {8.0: pytest.approx(math.exp(0.85)), 16.0: pytest.approx(math.exp(0.5))}


def test_a_best_batch_at_the_edge_of_its_grid_is_named_and_makes_no_law():
    points = [point for point in grid_of_batches(rates=(1.0,)) if point.batch_tokens < 2e5]
    found = batch_laws(points)
    assert any(
        "edge optimum: the best batch of" in edge and "is the largest of its grid" in edge for edge in found.edges
    )
    two = [point for point in points if point.batch_tokens < 3e4]
    assert batch_laws(two).cells == ()


def test_sizes_and_budgets_are_equal_up_to_rounding():
    exact = list(grid_of_batches(budgets=BUDGETS[4:5]))
    rounded = [replace(point, flops=point.flops * (1 + 0.01 * (place % 2)), flops_per_token=size)
               for place, point in enumerate(exact)
               for size in [point.flops_per_token * (1 + 1e-8 * (place % 3))]]  # fmt: skip
    found, wanted = batch_laws(rounded), batch_laws(exact)
    assert [cell.run for cell in found.cells] == [cell.run for cell in wanted.cells]
    assert [point.excluded for point in best_of_settings(rounded)] == [p.excluded for p in best_of_settings(exact)]


@pytest.mark.parametrize("rates", [(1.0, 1.41), (1.0, 1.41, 2.0)])
def test_a_best_rate_at_the_edge_of_its_grid_is_named_and_makes_no_law(rates):
    found = batch_laws(list(grid_of_batches(budgets=BUDGETS[4:5], rates=rates)))
    assert found.cells
    assert {(cell.rate, cell.rate_vertex) for cell in found.cells} == {(None, None)}
    assert found.rate == {}
    named = [edge for edge in found.edges if "the best learning rate of" in edge and "is the smallest of" in edge]
    assert len(named) == len(found.cells)


def planted_sweep():
    """All that a sweep can have: batches, rates, cooldown branches, and runs that repeat their data."""
    points = list(grid_of_batches(sizes=SIZES[1:8], rates=(0.6, 1.0, 1.7), luck=0.0005))
    rng = np.random.default_rng(1)
    branches = []
    for place in range(6):
        unannealed = 3.0 + 0.1 * place
        ratio = 1.0245 * math.exp(0.001 * rng.standard_normal())
        branches.append(Branch(f"b{place}", f"t{place}", "masked", 1e9, unannealed, unannealed / ratio))
    for place, size in enumerate(np.repeat(SIZES[2:6], 4)):
        unique, epochs = 2e9, (2, 4, 8, 16)[place % 4]
        worth = unique * (1 + 12 * -math.expm1(-(epochs - 1) / 12))
        loss = float(MASKED(np.float64(size), np.float64(worth))) * math.exp(0.0003 * rng.standard_normal())
        points.append(Point(f"r{place}", "masked", size * unique * epochs, size, unique * epochs, loss, None,
                            size / 7.3, 2.0**17, 0.5, unique_tokens=unique))  # fmt: skip
    scales = tuple(NoiseScale(f"s{place % 4}", "masked", tokens, 3 * tokens**0.6 * math.exp(0.02 * place % 4), 9.0, 0.8)
                   for place, tokens in enumerate(np.geomspace(1e8, 1e10, 12)))  # fmt: skip
    return gathered(
        points, branches=tuple(branches), noise_scales=scales, setting_ranges={"seq_length": (2048.0, 2048.0)}
    )


def test_a_sweep_with_everything_becomes_a_law_file_that_plans_alone(tmp_path):
    from matplotlib.figure import Figure

    results = fit_points(planted_sweep(), draws=40)
    file = law_file(results, "own", written := written_laws(results))
    write_law_file(tmp_path / "law.yaml", file)
    book = LawBook((read_law_file(tmp_path / "law.yaml"),))
    assert {law.quantity for law in file.laws} == {
        "flops_per_token", "tokens", "loss", "params", "batch_tokens", "learning_rate", "batch_efficiency",
        "annealing_ratio", "repeat_scale", "noise_scale",
    }  # fmt: skip
    made = plan(Goal("masked", flops=1e19), book)
    size = 0.01761 * 1e19**0.56629
    assert made.frontier.best_size(1e19) == pytest.approx(size, rel=0.1)
    assert made.annealing_ratio == pytest.approx(1.0245, abs=0.002)
    assert made.batch_wanted == pytest.approx(best_batch(1e19 / size), rel=0.4)
    assert made.learning_rate == pytest.approx(10**-2.06 * made.batch_tokens**0.3412, rel=0.3)
    assert not any("by the laws of" in remark for remark in made.remarks)
    repeated = plan(Goal("masked", flops=1e19, tokens=3e9), LawBook((*book.files, *published().files)))
    r_star = book.law("repeat_scale", noise="masked", form="constant")
    assert r_star.value() == pytest.approx(12, rel=0.4)
    assert r_star.interval(1.0)[0] < r_star.value() < r_star.interval(1.0)[1]
    assert repeated.frontier.repeat_scale == r_star.value()
    lines = "\n".join(summary(results))
    for words in ("best batch (vertex)", "best learning rate (vertex)", "hyperbola of", "a cooldown divides the",
                  "repeated data: R* = ", "gradient noise scale, tokens: "):  # fmt: skip
        assert words in lines
    found = record(results, file, written)
    assert len(found["cooldowns"]) == 6
    assert len(found["noise_scales"]) == 12
    drawn = [sketch for sketch in draw_all(results, tmp_path / "figures") if sketch.section in ("batch", "cooldowns")]
    assert [sketch.name for sketch in drawn] == ["hyperbolas-masked", "batch-masked", "noise-scale", "cooldowns"]
    figures.laws(figure := Figure(), list(results.noises), "deepseek", published())
    labels = [line.get_label() for axes in figure.axes for line in axes.lines if line.get_linestyle() == ":"]
    assert labels == ["gidd: C^0.566", "gidd: C^0.434", "gidd: C^-0.050"]
    page = fit_page(found, drawn, lines.split("\n"), now=datetime.now(timezone.utc))
    assert set(re.findall(r'<section id="([^"]+)"', page)) >= {"batch", "cooldowns", "laws", "bowls"}
    assert any("same_slope_p_value" in law for law in found["laws"])


def test_a_floor_that_the_power_law_lacks_is_seen_by_the_held_out_budget():
    def loss(size, tokens):
        return 2.0 + (2e9 / size) ** 0.6 + (2e9 / tokens) ** 0.6

    points = [
        Point(f"{size:.3g}", "masked", flops, size, flops / size, loss(size, flops / size))
        for size in np.geomspace(1e8, 4e10, 12)
        for flops in np.geomspace(1e18, 1e21, 5)
        if 0.02 < size**2 / flops < 50
    ]
    fitted = fit_points(gathered(points), draws=20)
    (reason,) = (reason for reason in fitted.reservations if "largest budget" in reason)
    assert re.search(
        r"predicted -\d+\.\d\d % off by the power law of the others; by their surfaces, [-+]0\.00 %", reason
    )
    assert float(re.search(r"predicted (-\S+) %", reason)[1]) < -1.5
    lines = [line for line in summary(fitted) if "held out" in line and "mean loss" in line]
    assert [re.sub("[-+]", "", line.split("(")[1]) for line in lines] == ["0.00 %)", "0.00 %)"]


def test_points_of_repeated_data_and_of_the_highest_losses_do_not_count(tmp_path):
    table = tmp_path / "points.csv"
    rows = ["run,flops,tokens,loss,unique_tokens", "a,1e18,1e9,3.0,1e9", "b,1e18,2e9,3.1,1e9", "c,1e18,1.4e9,3.4,1e9"]
    table.write_text("\n".join(rows) + "\n")
    found = from_csv(table)
    assert {point.run: point.excluded for point in found.points} == {"a": "", "b": "its data are repeated", "c": ""}
    fewer = without_highest(found, 1)
    assert {point.run: bool(point.excluded) for point in fewer.points} == {"a": False, "b": True, "c": True}
    assert fewer.notes == ("the 1 highest losses are left out",)
    assert BEATEN not in {point.excluded for point in found.points}
