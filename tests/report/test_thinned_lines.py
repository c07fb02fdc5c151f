"""Lines of a long run: few are kept, and everything that a chart shows of the others."""

from __future__ import annotations

import json
import random

import pytest

from megadiff.metric_lines import Line
from megadiff.report.line_chart import Point, downsample
from megadiff.report.run_record import CHARTED, ThinnedLines, read_metric_lines
from tests.report.folders import training_line, write_run

LINES = 60_000


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    draw = random.Random(0)
    found = []
    for step in range(1, LINES + 1):
        figures = {key: draw.gauss(5.0, 1.0) for key in CHARTED}
        bins = [[low, low + 3.0, draw.random()] for low in (-9.0, -6.0) if draw.random() < 0.9]
        found.append({"step": step, "tokens": 64 * step, **figures, "loss_by_log_snr": bins})
    return found


def _kept(lines: list[Line]) -> list[Line]:
    thinned = ThinnedLines()
    for line in lines:
        thinned.add(line)
    return thinned.in_order()


def test_a_run_of_ten_thousand_lines_is_kept_whole(lines):
    assert _kept(lines[:10_000]) == lines[:10_000]


@pytest.mark.parametrize("count", [10_241, 33_333, LINES])
def test_of_a_long_run_few_lines_are_kept_with_the_first_and_last(lines, count):
    kept = _kept(lines[:count])
    assert len(kept) < 11_000
    assert (kept[0], kept[-1]) == (lines[0], lines[count - 1])


def test_a_chart_of_the_kept_lines_has_the_lows_and_highs_of_all(lines):
    """Both are drawn with the lowest and the highest value of each of some hundred intervals."""

    def drawn(shown: list[Line], key: str) -> list[Point]:
        return downsample([Point(line["step"], line[key]) for line in shown], 300)

    def envelope(points: list[Point]) -> list[float]:
        found = []
        for part in range(8):
            values = [point.y for point in points if point.y is not None and part == int(8 * (point.x - 1) / LINES)]
            found += [min(values), max(values)]
        return found

    kept = _kept(lines)
    for key in CHARTED:
        assert envelope(drawn(kept, key)) == pytest.approx(envelope(drawn(lines, key)), abs=0.5)
        values, shown = [line[key] for line in lines], [line[key] for line in kept]
        assert (min(shown), max(shown)) == (min(values), max(values))
    for place in (0, 1):
        edge = (-9.0, -6.0)[place]
        whole, own = (
            [part[2] for line in some for part in line["loss_by_log_snr"] if part[0] == edge] for some in (lines, kept)
        )
        assert (min(own), max(own)) == (min(whole), max(whole))


def test_steps_without_an_update_and_breaks_of_a_curve_are_kept(lines):
    skipped = {12_345: {"skipped": "non_finite", "loss": None}, 45_678: {"skipped": "spike"}}
    changed = [{**line, **skipped.get(line["step"], {})} for line in lines]
    changed[50_000] = {**changed[50_000], "elbo": None}
    kept = {line["step"]: line for line in _kept(changed)}
    assert [step for step, line in kept.items() if line.get("skipped")] == [12_345, 45_678]
    assert kept[50_001]["elbo"] is None


def test_lines_of_other_programs_do_no_harm(lines):
    strange = {
        "loss": "high",
        "elbo": True,
        "lr": [],
        "loss_by_log_snr": [[[], {}, 1.0], [1.0, 2.0], "x", [0.0, 3.0, None]],
    }
    kept = _kept([{**line, **strange} for line in lines[:20_000]])
    assert len(kept) < 11_000


def test_the_median_rate_is_that_of_all_lines(tmp_path):
    run = [training_line(step, tokens_per_s=float(step % 7)) for step in range(1, 12_001)]
    found = read_metric_lines(
        write_run(tmp_path / "run", [*run, json.loads('{"step": 3, "other": 1}')]) / "metrics.jsonl"
    )
    assert found.tokens_per_s == 3.0
    assert len(found.training) < 11_000
