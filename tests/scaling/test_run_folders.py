"""Points of run folders: planned evaluations, cooldown branches, repeated data, and objectives side by side."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import yaml

from megadiff.report.fit_page import fit_page
from megadiff.scaling.comparisons import paired_runs
from megadiff.scaling.fit import power_law
from megadiff.scaling.fit_record import law_file, record, summary, written_laws
from megadiff.scaling.fit_results import fit_points
from megadiff.scaling.points import REPEATED, from_runs
from megadiff.scaling.run_curves import flops_per_token_of
from tests.scaling.planted import MASKED, UNIFORM
from tests.scaling.run_folders import FLOPS_A_STEP, SHAPES, clean_sweep, write_run

BUDGETS = [FLOPS_A_STEP * steps for steps in (419.5, 819.5, 1619.5)]
PLANNED = {"eval": {"at_flops": BUDGETS}, "schedule__flop_count": "deepseek"}


def only_planned(line):
    """The line of a run that is evaluated at its budgets alone, each at the first step that reaches it."""
    if "eval_elbo" not in line:
        return {**line, "elbo": line["loss"] * 1.5}
    return line if line["step"] in (420, 820, 1620) else {"step": line["step"]}


def test_planned_evaluations_are_the_budgets_and_come_first(tmp_path):
    runs = [write_run(tmp_path / f"{a}x{b}", a, b, change=only_planned, **PLANNED) for a, b in SHAPES]
    found = from_runs(runs, min_steps=100)
    assert sorted({point.flops for point in found.points}) == BUDGETS
    assert len(found.counted) == 3 * len(SHAPES)
    for point in found.counted:
        assert point.loss == pytest.approx(float(MASKED(np.float64(point.flops_per_token), point.tokens)), rel=0.002)
        assert point.step == pytest.approx(point.flops / FLOPS_A_STEP)
    assert found.notes == ()
    assert found.setting_ranges == {"seq_length": (64.0, 64.0)}
    other = from_runs(runs, min_steps=100, flop_count="chinchilla")
    assert BUDGETS[0] not in {point.flops for point in other.points}


def test_the_vocabularies_of_the_runs_are_a_range_of_their_laws(tmp_path):
    """A run's settings name its vocabulary, or its `data.json` does, and the settings say nothing."""
    runs = clean_sweep(tmp_path)
    named = write_run(tmp_path / "named", 2, 96, seed=1, data={"vocab_size": 300})
    recorded = write_run(tmp_path / "recorded", 2, 96, seed=2, data={"vocab_size": None})
    facts = json.loads((recorded / "data.json").read_text())
    (recorded / "data.json").write_text(json.dumps({**facts, "vocab_size": 260}))
    found = from_runs([*runs, named, recorded], min_steps=100)
    assert found.excluded == ()
    assert found.setting_ranges == {"seq_length": (64.0, 64.0), "vocab_size": (260.0, 300.0)}


def test_a_run_has_no_loss_at_a_budget_of_another_noise_alone(tmp_path):
    between = FLOPS_A_STEP * 1158

    def planned(line):
        return line if "eval_elbo" in line and line["step"] == 1160 else only_planned(line)

    runs = [write_run(tmp_path / "masked" / f"{a}x{b}", a, b, change=only_planned, **PLANNED) for a, b in SHAPES]
    more = {**PLANNED, "eval": {"at_flops": sorted([*BUDGETS, between])}}
    runs += [write_run(tmp_path / "uniform" / f"{a}x{b}", a, b, surface=UNIFORM, change=planned,
                       noise={"shift": "uniform"}, **more) for a, b in SHAPES]  # fmt: skip
    found = from_runs(runs, min_steps=100)
    assert {point.noise for point in found.points if point.flops == between} == {"uniform"}
    assert Counter(point.noise for point in found.points) == {"masked": 3 * len(SHAPES), "uniform": 4 * len(SHAPES)}
    named = from_runs(runs, min_steps=100, budgets=[*BUDGETS, between])
    assert {point.flops for point in named.points if point.noise == "masked"} == set(BUDGETS)
    wider = from_runs(runs, min_steps=100, budgets=[between], window=2.0)
    assert {point.noise for point in wider.points} == {"masked", "uniform"}


def test_one_planned_evaluation_is_enough_and_runs_without_any_are_named(tmp_path):
    def once(line):
        return only_planned(line) if line["step"] <= 420 or "loss" in line else {"step": line["step"]}

    runs = [write_run(tmp_path / f"{a}x{b}", a, b, change=once, **PLANNED) for a, b in SHAPES[:-1]]
    assert {point.flops for point in from_runs(runs, min_steps=100).points} == {BUDGETS[0]}

    def trained(line):
        return {"step": line["step"]} if "eval_elbo" in line else {**line, "elbo": line["loss"]}

    runs.append(write_run(tmp_path / "bare", *SHAPES[-1], change=trained, **PLANNED))
    found = from_runs(runs, min_steps=100)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("1 of 7 runs have too few evaluations, so training losses stand in (")


def branch(folder, trunk, shape, *, step=1000, length=200, ratio=1.0245, **settings):
    """A cooldown from a checkpoint of a trunk, whose loss ends at the trunk's over the ratio."""
    start = str(trunk / "checkpoints" / f"step_{step:08d}")
    schedule = {"steps": step + length, "decay_steps": length, "warmup_steps": 10}

    def change(line):
        if line["step"] <= step:
            return {"step": line["step"]}
        share = (line["step"] - step) / length
        found = {key: line[key] * ratio**-share for key in ("loss", "eval_elbo") if key in line}
        return {**line, **found, **({"lr": 0.1 * (1 - share)} if "lr" in line else {})}

    return write_run(folder, *shape, steps=step + length, change=change, checkpoint={"start_from": start},
                     schedule=schedule, **settings)  # fmt: skip


def test_a_run_that_took_weights_alone_is_measured_as_any_other(tmp_path):
    plain, *others = clean_sweep(tmp_path)
    lines = (plain / "metrics.jsonl").read_text().splitlines(keepends=True)
    (plain / "metrics.jsonl").write_text("".join(line for line in lines[:-1] if "eval_elbo" not in line) + lines[-1])
    begun = shutil.copytree(plain, tmp_path / "begun")
    config = yaml.safe_load((begun / "config.yaml").read_text())
    config["checkpoint"] = {"start_from": str(others[0] / "checkpoints/step_00000900"), "weights_only": True}
    (begun / "config.yaml").write_text(yaml.safe_dump(config))
    one, other = (from_runs([run, *others], min_steps=100) for run in (plain, begun))
    assert len(one.points) > 3
    assert [(point.flops, point.loss) for point in other.points] == [(point.flops, point.loss) for point in one.points]
    assert [left.reason for left in other.excluded] == [left.reason for left in one.excluded] == ["too short"]


def test_cooldown_branches_are_paired_with_their_trunks_at_equal_tokens(tmp_path):
    trunks = clean_sweep(tmp_path)
    branches = [branch(tmp_path / f"b{place}", trunk, shape)
                for place, (trunk, shape) in enumerate(zip(trunks[:3], SHAPES[:3], strict=True))]  # fmt: skip
    lost = branch(tmp_path / "lost", tmp_path / "elsewhere", SHAPES[3])
    late = branch(tmp_path / "late", trunks[3], SHAPES[3], step=1800)
    short = branch(tmp_path / "short", trunks[4], SHAPES[4], lines=1100)
    other = branch(tmp_path / "other", trunks[5], SHAPES[5], data_is="b" * 64)
    (other / "config.yaml").write_text((other / "config.yaml").read_text().replace("data_is", "remark"))
    moved = tmp_path / "moved"
    shutil.copytree(trunks[0], moved / trunks[0].name)
    found = from_runs([*trunks, *branches, lost, late, short, other], min_steps=100)
    assert [pair.run for pair in found.branches] == [str(path) for path in branches]
    for pair, trunk in zip(found.branches, trunks, strict=False):
        luck = pair.unannealed / pair.annealed
        planted = float(MASKED(np.float64(flops_per_token(trunk)), np.float64(pair.tokens)))
        assert pair.unannealed == pytest.approx(planted, rel=0.005)
        assert pair.annealed == pytest.approx(planted / 1.0245, rel=0.005)
        assert 1.02 < luck < 1.03
    reasons = {left.run.rpartition("/")[2]: left.reason for left in found.excluded}
    assert reasons == {"lost": "no trunk", "late": "no trunk", "short": "unfinished", "other": "other data"}
    elsewhere = from_runs([moved / trunks[0].name, *trunks[1:], branches[0]], min_steps=100)
    assert [pair.trunk for pair in elsewhere.branches] == [str(moved / trunks[0].name)]


def flops_per_token(folder):
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    return flops_per_token_of({f"model.{key}": value for key, value in model.items()}, "deepseek")


def test_tokens_of_several_sources_count_once_each(tmp_path):
    runs = clean_sweep(tmp_path)

    def epochs(line):
        return {**line, "epochs": {"small": 8 * line["step"] / 2000, "large": 0.5 * line["step"] / 2000}}

    again = write_run(tmp_path / "again", 2, 96, change=epochs)
    facts = {"fingerprint": "a" * 64, "train": [{"source": "small", "tokens": 1e9}, {"source": "large", "tokens": 4e9}]}
    (again / "data.json").write_text(json.dumps(facts))
    points = [point for point in from_runs([*runs, again], min_steps=100).points if point.run == str(again)]
    for point in points:
        passes = 8 * point.step / 2000, 0.5 * point.step / 2000
        share = (min(passes[0], 1) * 1e9 + passes[1] * 4e9) / (passes[0] * 1e9 + passes[1] * 4e9)
        assert point.unique_tokens == pytest.approx(share * point.tokens, rel=0.05)
        assert (point.excluded == REPEATED) == (point.tokens > 1.5 * point.unique_tokens)
    assert {point.excluded for point in points} >= {REPEATED}


def keep_sequences(folder, fingerprint="f" * 8):
    """Write the figures of 64 sequences beside every evaluation: shared difficulty, and a loss of the run's own."""
    difficulty = np.random.default_rng(0).normal(0, 0.3, 64)
    rng = np.random.default_rng(sum(map(ord, str(folder.name))))
    lines = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "eval_elbo" in line:
            figures = (line["eval_elbo"] + difficulty + rng.normal(0, 0.01, 64)).tolist()
            lines.append({"step": line["step"], "sequences": fingerprint, "noise": None, "elbo": figures})
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_objectives_side_by_side_are_compared_over_the_same_sequences(tmp_path):
    runs = [write_run(tmp_path / "masked" / f"{a}x{b}", a, b, **PLANNED) for a, b in SHAPES]
    runs += [write_run(tmp_path / "ar" / f"{a}x{b}", a, b, surface=UNIFORM, method__name="next_token", **PLANNED)
             for a, b in SHAPES]  # fmt: skip
    for run in runs:
        keep_sequences(run)
    found = from_runs(runs, min_steps=100)
    assert {point.noise for point in found.points} == {"masked", "next_token"}
    pairs, refusals = paired_runs(found.counted)
    assert refusals == []
    assert sorted(pair.flops for pair in pairs if pair.what == "best") == BUDGETS
    for pair in pairs:
        if pair.what != "best":
            d = pair.difference
            own = [next(point for point in found.points if point.run == run and point.flops == pair.flops)
                   for run in (*pair.first.runs, *pair.second.runs)]  # fmt: skip
            assert d.difference == pytest.approx(own[0].loss - own[1].loss, abs=0.015)
            assert d.stderr < d.unpaired_stderr / 10
            assert math.isclose(own[0].flops_per_token, own[1].flops_per_token)
    results = fit_points(found, draws=20)
    written = record(results, law_file(results, "own", laws := written_laws(results)), laws)
    page = fit_page(written, [], summary(results), now=datetime.now(timezone.utc))
    for pair in pairs:
        for side in (pair.first, pair.second):
            assert f"<td>{side.noise} ({Path(side.runs[0]).name})</td>" in page
    keep_sequences(runs[0], fingerprint="e" * 8)
    pairs, refusals = paired_runs(found.counted)
    assert len(refusals) == 1
    assert refusals[0].startswith("pairs of masked and next_token: the runs were evaluated on different sequences")


def test_seeds_are_averaged_and_other_steps_are_no_pairs(tmp_path):
    runs = [write_run(tmp_path / f"m{seed}" / f"{a}x{b}", a, b, seed=seed, luck=1 + 0.01 * seed, **PLANNED)
            for a, b in SHAPES[2:5] for seed in (0, 1)]  # fmt: skip
    runs += [write_run(tmp_path / "ar" / f"{a}x{b}", a, b, surface=UNIFORM, method__name="next_token", **PLANNED)
             for a, b in SHAPES[2:5]]  # fmt: skip
    for run in runs:
        keep_sequences(run)
    found = from_runs(runs, min_steps=100)
    pairs, refusals = paired_runs(found.counted)
    assert (len(pairs), refusals) == (3 * 4, [])
    for pair in pairs:
        masked, other = ([point.loss for point in found.counted if point.run in side.runs and point.flops == pair.flops]
                         for side in (pair.first, pair.second))  # fmt: skip
        assert (len(masked), len(other)) == (2, 1)
        assert pair.difference.difference == pytest.approx(np.mean(masked) - other[0], abs=0.01)
        assert set(pair.first.steps) == set(pair.second.steps) <= {420, 820, 1620}
    assert pairs[0].first.describe() == "masked (2 runs, step 420)"
    apart = from_runs(runs, min_steps=100, budgets=[FLOPS_A_STEP * 418])
    assert {point.noise for point in apart.counted} == {"masked", "next_token"}
    assert paired_runs(apart.counted) == ([], [])


def test_measured_noise_scales_get_a_law_over_tokens(tmp_path):
    def gauged(line):
        """The line with a scale that is proportional to the step; averages of it are not read."""
        if "eval_elbo" not in line or line["step"] % 100:
            return line
        own = {"measured_trace_data": 2.0, "measured_trace_noise": 8.0, "measured_norm_squared": 1000 / line["step"],
               "scale": 1.0, "scale_tokens": 64.0}  # fmt: skip
        return {**line, **{f"gradient_noise/{name}": value for name, value in own.items()}}

    runs = clean_sweep(tmp_path)
    runs[0] = write_run(tmp_path / "gauged", 2, 64, change=gauged, seed=1)
    drowned = {"gradient_noise/measured_trace_data": 1.0, "gradient_noise/measured_trace_noise": 1.0,
               "gradient_noise/measured_norm_squared": -1.0}  # fmt: skip
    runs[1] = write_run(tmp_path / "drowned", 3, 64, change=lambda line: {**line, **drowned}, seed=1)
    found = from_runs(runs, min_steps=200)
    assert {scale.run for scale in found.noise_scales} == {str(runs[0])}
    size = flops_per_token(runs[0])
    steps = [scale.tokens * size / FLOPS_A_STEP for scale in found.noise_scales]
    windows = [(200, 300, 400), range(500, 1000, 100), range(1000, 2000, 100)]
    assert steps == pytest.approx([math.exp(np.mean(np.log(window))) for window in windows])
    for scale, step in zip(found.noise_scales, steps, strict=True):
        assert (scale.noise, scale.noise_share) == ("masked", pytest.approx(0.8))
        assert scale.scale == pytest.approx(64 * step / 100, rel=0.05)
        assert 0 < scale.stderr < 0.3 * scale.scale
    fitted = power_law([scale.tokens for scale in found.noise_scales], [scale.scale for scale in found.noise_scales])
    assert fitted.exponent == pytest.approx(1.0, abs=0.03)
