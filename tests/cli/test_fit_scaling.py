"""`megadiff fit_scaling`: from run folders or a CSV file to laws, with every run that is left out by name."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from megadiff.cli.fit_scaling import main
from megadiff.cli.plan import main as plan_command
from megadiff.errors import MegadiffError
from megadiff.scaling import surface_fit
from megadiff.scaling.laws import LawBook, read_law_file
from megadiff.scaling.points import from_csv, from_runs
from megadiff.scaling.run_curves import flops_per_token_of, loss_at
from tests.scaling.planted import MASKED, UNIFORM, sweep
from tests.scaling.run_folders import FLOPS_A_STEP, clean_sweep, write_run

HEAD = "run,noise,flops,flops_per_token,loss"


def fit(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["fit_scaling", *map(str, words)])
    main()


@pytest.fixture
def few_starts(monkeypatch):
    """Descend from every ninth start alone: that the starts find one minimum is for tests of the surface's fit."""
    monkeypatch.setattr(surface_fit, "_STARTS", surface_fit._STARTS[::9])


def rows_of(surface=MASKED, noise="masked", seed=0, luck=0.001):
    columns = zip(*sweep(np.random.default_rng(seed), surface, noise=luck), strict=True)
    return [f"{noise}-{run},{noise},{float(c)!r},{float(m)!r},{float(loss)!r}" for c, m, loss, run in columns]


def write_csv(path, rows, head=HEAD):
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


@pytest.mark.usefixtures("few_starts")
def test_a_comparison_beyond_the_runs_is_marked(tmp_path, monkeypatch, capsys):
    """The second noise reaches in its whole range no loss that the first has."""
    far = [row.rsplit(",", 1) for row in rows_of(UNIFORM, "uniform", 1)]
    table = write_csv(tmp_path / "points.csv", [*rows_of(), *(f"{head},{0.5 * float(loss)!r}" for head, loss in far)])
    fit(monkeypatch, "--csv", table, "--output", tmp_path / "out", "--draws", 30, "--no-figures")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("masked and uniform: "))
    assert line.endswith("(extrapolated)")
    assert "(extrapolated)" in (tmp_path / "out/index.html").read_text()


def test_a_csv_of_two_noises_gives_laws_tables_figures_and_a_page(tmp_path, monkeypatch, capsys):
    table = write_csv(tmp_path / "points.csv", [*rows_of(), *rows_of(UNIFORM, "uniform", 1)])
    fit(monkeypatch, "--csv", table, "--output", tmp_path / "out", "--draws", 30, "--baseline", "published")
    said = capsys.readouterr().out
    assert "bowls: 9 of 9 vertices count" in said
    assert re.search(r"a single bowl: M\* ~ C\^0\.\d+ \[.*; misfit 1\.?\d* \(p = ", said)
    assert "masked and uniform: cross at" in said
    found = read_law_file(tmp_path / "out/law.yaml")
    assert (found.name, found.runs, found.provisional, found.excluded) == ("out", 18, False, ())
    law = LawBook((found,)).law("flops_per_token", noise="masked", flop_count="deepseek")
    low, high = law.parameters["alpha"].interval
    assert low < 0.56629 < high
    assert law.valid["flops"] == pytest.approx([5e17, 2e20])
    assert np.quantile(np.array(law.draws)[:, 1], [0.16, 0.84]) == pytest.approx([low, high], abs=(high - low) / 2)
    assert {law.estimator for law in found.laws} == {"vertex", "best_run", "single_bowl", "lse", "varpro"}
    for law in found.laws:
        if law.form == "surface":
            (unseen,) = law.held_out
            assert unseen.at == pytest.approx(2e20)
            assert unseen.predicted == pytest.approx(unseen.measured, rel=0.005)
    record = json.loads((tmp_path / "out/fit.json").read_text())
    is_beyond = record["comparisons"][0]["crossing"]["is_extrapolated"]
    line = next(line for line in said.splitlines() if line.startswith("masked and uniform: cross at"))
    assert ("extrapolated" in line.split(";")[0]) == is_beyond
    assert record["bowls"]["masked"]["budgets"][0]["excluded"] == ""
    assert record["laws"][0]["convergence"]["converged"]
    assert set(record["bowls"]["masked"]["single"]) == {"curvature", "p_value", "misfit"}
    with (tmp_path / "out/points.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 162
    drawn = {
        "bowls-masked", "bowls-uniform", "laws", "surface-masked", "surface-uniform", "residuals", "exponents",
        "noises", "compute-saved",
    }  # fmt: skip
    for ending in ("png", "svg", "pdf"):
        assert {path.stem for path in (tmp_path / "out/figures").glob(f"*.{ending}")} == drawn
    check_page(page := (tmp_path / "out/index.html").read_text(), drawn)
    assert "dotted: the baseline" in page
    assert page.count("surface (lse), mean of 9 points") == page.count("surface (varpro), mean of 9 points") == 2
    plans_the_planted_optimum(monkeypatch, capsys, tmp_path / "out/law.yaml")


def check_page(page, drawn):
    """The page loads nothing, obeys its own policy, and shows every figure and section."""
    assert set(re.findall(r'<figure id="figure-([^"]+)"', page)) == drawn
    assert page.count("<svg") == len(drawn)
    assert re.search(r"""http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-""", page)
    assert "unsafe-inline" not in page
    assert not re.search(r"\sstyle=|\ssrc=|<script|href=\"http", page)
    assert {"summary", "bowls", "laws", "surface", "residuals", "exponents", "noises", "left-out"} <= set(
        re.findall(r'<section id="([^"]+)"', page)
    )
    assert 'fill="currentColor"' in page
    assert 'class="c0"' in page
    names = re.findall(r'\sid="([^"]+)"', page)
    assert len(names) == len(set(names))
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def plans_the_planted_optimum(monkeypatch, capsys, laws):
    """`megadiff plan` reads the fit, plans near the planted optimum, and names the laws that stand in."""
    monkeypatch.setattr(sys, "argv", ["plan", "--laws", str(laws), "--flops", "1e20"])
    plan_command()
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("masked")).split()
    assert float(row[2]) == pytest.approx(0.01761 * 1e20**0.56629, rel=0.15)
    assert float(row[4]) == pytest.approx(27.21883 * 1e20**-0.04961, rel=0.003)
    assert "batch_tokens and learning_rate and annealing_ratio by the laws of gidd; out has none of its own" in table
    monkeypatch.setattr(sys, "argv", ["plan", "--laws", str(laws), "--flops", "1e20", "--noise", "uniform"])
    plan_command()
    lines = capsys.readouterr().out
    assert "second method     the surface fit expects" in lines
    assert "without differences from run to run" not in lines


@pytest.mark.usefixtures("few_starts")
def test_columns_of_other_names_and_the_count_of_parameters(tmp_path, monkeypatch, capsys):
    rows = [",".join([row.split(",")[2], str(float(row.split(",")[3]) / 6), row.split(",")[4]]) for row in rows_of()]
    table = write_csv(tmp_path / "other.csv", rows, "Training FLOP,Model Size,final")
    words = ("--columns", "params=Model Size", "flops=Training FLOP", "loss=final", "--draws", 20, "--no-figures")
    fit(monkeypatch, "--csv", table, *words, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "other.csv, each row a run of its own: FLOPs by the count chinchilla" in said
    assert "over parameters, M = 6 P: " in said
    assert not (tmp_path / "out/figures").exists()
    words = (*words[:-3], "--flop-count", "deepseek", "--draws", 20)
    with pytest.raises(MegadiffError, match="parameters alone give no FLOPs per token by the count deepseek"):
        fit(monkeypatch, "--csv", table, *words, "--output", tmp_path / "out")


COLUMNS_OF_OTHERS = {
    "parameters and FLOPs": ("N,C,loss", "{n}e6,{c},{loss}", ("params=N", "flops=C"), "chinchilla"),
    "parameters and tokens in millions and billions": (
        "Params (M),D [B],final loss", "{n},{d},{loss}",
        ("params=Params (M)*1e6", "tokens=D [B]*1e9", "loss=final loss"), "chinchilla",
    ),
    "FLOPs and tokens": ("flops,tokens,loss", "{c},{d}e9,{loss}", (), "deepseek"),
    "all three, which agree": ("params,flops,tokens,loss", "{n}e6,{c},{d}e9,{loss}", (), "chinchilla"),
    "semicolons and a byte order mark": ("\ufeffparams;tokens;loss", "{n}e6;{d}e9;{loss}", (), "chinchilla"),
    "tabs": ("params\ttokens\tloss", "{n}e6\t{d}e9\t{loss}", (), "chinchilla"),
    "quoted names with commas": ('"size, M",tokens,loss', '"{n}",{d}e9,{loss}', ("params=size, M*1e6",), "chinchilla"),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS_OF_OTHERS)
def test_a_data_set_of_others_is_read_by_the_names_of_its_columns(name, tmp_path):
    head, form, names, count = COLUMNS_OF_OTHERS[name]
    rows = []
    for n, d in ((10, 1), (20, 2), (40, 4)):
        rows.append(form.format(n=n, d=d, c=6 * n * 1e6 * d * 1e9, loss=3.5 - 0.1 * d))
    path = write_csv(tmp_path / "other.csv", rows, head)
    found = from_csv(path, dict(each.split("=", 1) for each in names))
    assert found.flop_count == count
    assert [point.tokens for point in found.points] == pytest.approx([1e9, 2e9, 4e9])
    assert [point.flops_per_token for point in found.points] == pytest.approx([6e7, 1.2e8, 2.4e8])
    assert [point.loss for point in found.points] == pytest.approx([3.4, 3.3, 3.1])


GOOD = ["r1,m,1e18,1e9,3.0", "r2,m,1e18,2e9,2.9"]
HOSTILE = {
    "empty": (b"", "is empty"),
    "only names": (HEAD.encode(), "nothing below it"),
    "blank names": (b",,\n1,2,3\n", "is empty"),
    "binary": (bytes(range(256)), "is not UTF-8 text"),
    "nul": (f"{HEAD}\nr\0,m,1,2,3\n".encode(), "NUL characters"),
    "utf16": (f"{HEAD}\n{GOOD[0]}".encode("utf-16"), "is not UTF-8 text"),
    "no loss": (b"run,flops,tokens\na,1,2\n", "needs a column loss"),
    "loss alone": (b"run,loss\na,1\n", "needs a column loss and two of"),
    "same name twice": (b"loss,loss,flops,tokens\n1,2,3,4\n", "names the column `loss` twice"),
    "short row": (f"{HEAD}\n{GOOD[0]}\nr2,m,1e18\n".encode(), "3 cells where the first row has 5"),
    "long row": (f"{HEAD}\n{GOOD[0]},9\n".encode(), "6 cells where the first row has 5"),
    "open quote": (f'{HEAD}\n"r1,m,1e18,1e9,3.0\n'.encode(), "is not a CSV file"),
    "huge field": (f"{HEAD}\n{'x' * 200000},m,1e18,1e9,3.0\n".encode(), "is not a CSV file"),
    "words": (f"{HEAD}\nr1,m,many,1e9,3.0\n".encode(), "its flops is `many`, no number"),
    "all nan": (f"{HEAD}\nr1,m,1e18,1e9,nan\n".encode(), "r1: NaN"),
    "all infinite": (f"{HEAD}\nr1,m,1e18,1e9,inf\n".encode(), "r1: diverged"),
    "negative": (f"{HEAD}\nr1,m,1e18,-1e9,3.0\n".encode(), "not positive"),
    "zero loss": (f"{HEAD}\nr1,m,1e18,1e9,0\n".encode(), "not positive"),
    "contradiction": (b"run,flops,tokens,flops_per_token,loss\nr,1e18,1e9,1e8,3\n", "times flops_per_token x tokens"),
    "too few": ("\n".join([HEAD, *GOOD]).encode(), "determine no law"),
    "control characters": (f"{HEAD}\n\x1b[31mr1,m,\x1b[2J,1e9,3.0\n".encode(), "no number"),
    "5,000 digits": (f"{HEAD}\nr1,m,{'9' * 5000},1e9,3.0\n".encode(), "r1: diverged"),
    "nested JSON": (b'[{"a": [{"b": {}}]}]\n[1]\n', "needs a column loss"),
    "one huge line": (b"a" * 3_000_000, "is not a CSV file"),
    "wrong separator": (b"run|flops|tokens|loss\na|1|2|3\n", "needs a column loss"),
    "decimal commas": (b"run;flops;tokens;loss\na;1,5;2;3\n", "`1,5`, no number"),
    "1e400": (f"{HEAD}\nr1,m,1e18,1e9,1e400\n".encode(), "r1: diverged"),
    "huge exponent": (f"{HEAD}\nr1,m,1e999,1e9,3.0\n".encode(), "r1: diverged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_csv_is_answered_in_one_sentence(name, tmp_path, monkeypatch):
    content, said = HOSTILE[name]
    path = tmp_path / "points.csv"
    path.write_bytes(content)
    with pytest.raises(MegadiffError, match=said) as caught:
        fit(monkeypatch, "--csv", path, "--output", tmp_path / "out")
    assert caught.value.exit_code == 2
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_files_and_wrong_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a refused fit leaves its tables
    os.mkfifo(tmp_path / "fifo")
    table = write_csv(tmp_path / "points.csv", GOOD)
    for words, said in (
        (("--csv", tmp_path / "fifo"), "is a FIFO"),
        (("--csv", tmp_path), "is a folder"),
        (("--csv", tmp_path / "none.csv"), "cannot be read"),
        ((), "give run folders or --csv"),
        (("--csv", table, "x"), "and not both"),
        (("x", "--columns", "a=b"), "give --csv FILE too"),
        (("--csv", table, "--columns", "loss"), "OURS=THEIRS"),
        (("--csv", table, "--columns", "lss=loss"), "the columns are run"),
        (("--csv", table, "--columns", "loss=final"), "has no column `final`"),
        (("--csv", table, "--columns", "loss=loss*0"), "a factor is a positive number"),
        (("--csv", table, "--columns", "loss=loss*abc"), r"loss=loss\*abc: a factor is a positive number"),
        (("--csv", table, "--columns", "run=run*2"), "of a column of numbers"),
        (("--csv", table, "--columns", "loss=final*many"), r"has no column `final\*many`"),
        (("--csv", table, "--drop-highest", "2"), "leaves none of 2 points"),
        (("--csv", table, "--flop-count", "kaplan"), "kaplan"),
        (("--csv", table, "--keep", "ugly"), "the reasons are diverged"),
        (("--csv", table, "--level", "95"), "between 0.5 and 1"),
        (("--csv", table, "--draws", "1"), "between 10 and"),
        (("--csv", table, "--run-noise", "5"), "such as 0.001"),
        (("--csv", table, "--baseline", "none.yaml"), "none.yaml: the law file does not exist"),
        (("--csv", table, "--baseline", "published", "--no-figures"), "leave out --no-figures"),
        (("--csv", table, "--output", table), "is a file"),
        ((tmp_path / "nowhere",), "is no folder"),
        ((tmp_path, "--budgets", "-1"), "positive numbers"),
        ((tmp_path,), "unreadable"),
    ):
        with pytest.raises(MegadiffError, match=said):
            fit(monkeypatch, *words)


def test_without_a_law_the_tables_say_what_was_left_out(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / f"short{seed}", 2, 64, seed=seed, lines=1000) for seed in (0, 1)]
    with pytest.raises(MegadiffError, match=r"none of 2 runs gives a point .*; no law is written, but .*points\.csv"):
        fit(monkeypatch, *runs, "--min-steps", 100, "--output", tmp_path / "out")
    assert "left out: " in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"points.csv", "excluded.csv"}
    with (tmp_path / "out/points.csv").open() as file:
        found = {row["run"]: row["excluded"] for row in csv.DictReader(file)}
    assert found == {str(run): "unfinished: it took 1,000 of 2,000 steps" for run in runs}

    (tmp_path / "out/law.yaml").write_text("format: 1\n")
    table = write_csv(tmp_path / "points.csv", GOOD)
    with pytest.raises(
        MegadiffError, match=r"determine no law: .*, and law\.yaml there is of an earlier fit"
    ) as caught:
        fit(monkeypatch, "--csv", table, "--output", tmp_path / "out")
    assert caught.value.exit_code == 2
    with (tmp_path / "out/points.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["r1", "r2"]


@pytest.mark.parametrize("named", [".", "runs"])
@pytest.mark.usefixtures("few_starts")
def test_a_sweeps_folder_stands_for_its_runs(named, tmp_path, monkeypatch, capsys):
    runs = clean_sweep(tmp_path / "runs")
    entries = [{"name": run.name, "steps": 2000, "trunk": None} for run in runs]
    late = {"name": "late", "steps": 2000, "trunk": None}
    manifest = {"format": 1, "name": "s", "base": {}, "runs": [*entries, late]}
    (tmp_path / "sweep.json").write_text(json.dumps(manifest))
    words = ("--min-steps", 100, "--draws", 20, "--no-figures", "--output", tmp_path / "out")
    fit(monkeypatch, tmp_path / named, *words)
    assert "masked: 7 runs" in capsys.readouterr().out
    reasons = read_law_file(tmp_path / "out/law.yaml").provisional_reasons
    assert f"1 of the 8 runs of {tmp_path} have not begun" in reasons
    (tmp_path / "sweep.json").write_text(json.dumps({**manifest, "runs": [late]}))
    with pytest.raises(MegadiffError, match="is a sweep of which no run has begun"):
        fit(monkeypatch, tmp_path / named, *words)


# Dirty sweeps


def test_every_kind_of_dirty_run_is_left_out_by_name(tmp_path):
    runs = clean_sweep(tmp_path)
    late = {"change": lambda line: {**line, "eval_elbo": None} if line["step"] > 300 and "eval_elbo" in line else line}
    worse = {"change": lambda line: {k: v * 2 if k in ("loss", "eval_elbo") and line["step"] > 300 else v
                                     for k, v in line.items()}}  # fmt: skip
    dirty = {
        "NaN": write_run(tmp_path / "nan", 2, 96, **late),
        "diverged": write_run(tmp_path / "worse", 2, 96, seed=1, **worse),
        "unfinished": write_run(tmp_path / "short", 2, 96, seed=2, lines=1000),
        "other settings": write_run(tmp_path / "clip", 2, 96, seed=3, optimizer__clip_grad=5.0),
        "other data": write_run(tmp_path / "data", 2, 96, seed=4),
        "duplicate": write_run(tmp_path / "twice", 2, 64),
        "changed settings": write_run(tmp_path / "resumed", 2, 96, seed=5),
        "unreadable": write_run(tmp_path / "bare", 2, 96, seed=6),
        "too short": write_run(tmp_path / "brief", 2, 96, seed=7, steps=60),
    }
    (dirty["other data"] / "data.json").write_text(json.dumps({"fingerprint": "b" * 64}))
    (dirty["changed settings"] / "log.txt").write_text(
        "12:00 changed since     log.every: 1 -> 2\n12:00 changed since     optimizer.weight_decay: 0.0 -> 0.1\n"
    )
    (runs[0] / "log.txt").write_text("12:00 changed since     log.every: 1 -> 2\n")
    (dirty["unreadable"] / "config.yaml").unlink()
    found = from_runs([*runs, *dirty.values()], min_steps=100)
    reasons = {left.run: left.reason for left in found.excluded}
    assert reasons == {str(folder): reason for reason, folder in dirty.items()}
    assert {point.run for point in found.counted} == {str(run) for run in runs}
    kept = from_runs([*runs, dirty["unfinished"]], min_steps=100, kept=["unfinished"])
    assert str(dirty["unfinished"]) in {point.run for point in kept.points}


@pytest.mark.usefixtures("few_starts")
def test_points_lie_in_the_stable_stretch_and_give_the_planted_loss(tmp_path, monkeypatch, capsys):
    runs = clean_sweep(tmp_path)
    found = from_runs(runs, min_steps=100)
    for point in found.counted:
        planted = float(MASKED(np.float64(point.flops_per_token), np.float64(point.tokens)))
        assert point.loss == pytest.approx(planted, rel=0.004)
        assert 100 <= round(point.flops / FLOPS_A_STEP, 6) <= 1960
        assert point.flops == pytest.approx(point.flops_per_token * point.tokens)
    assert {point.noise for point in found.points} == {"masked"}
    for run in runs:
        facts = json.loads((run / "data.json").read_text())
        (run / "data.json").write_text(json.dumps({**facts, "vocab_size": 260}))
    fit(monkeypatch, *runs, "--min-steps", 100, "--draws", 30, "--no-figures", "--output", tmp_path / "out")
    assert "masked: 7 runs" in capsys.readouterr().out
    words = ["plan", "--laws", tmp_path / "out/law.yaml", "--noise", "masked", "--flops", "1e15", "--seq-length", "64"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    plan_command()
    said = capsys.readouterr().out
    assert "extrapolated      vocab_size 131,072 is above 260, the end of what was measured" in said


@pytest.mark.usefixtures("few_starts")
def test_a_provisional_law_says_why(tmp_path, monkeypatch, capsys):
    rows = [*rows_of(), "nan-run,masked,1e19,1e9,nan", "late,masked,1e19,2e9,3.0"]
    head = HEAD + ",status"
    rows = [row + (",running" if row.startswith("late") else ",") for row in rows]
    fit(monkeypatch, "--csv", write_csv(tmp_path / "p.csv", rows, head), "--draws", 20, "--output", tmp_path / "out",
        "--no-figures")  # fmt: skip
    found = read_law_file(tmp_path / "out/law.yaml")
    assert found.provisional
    assert {left.run: left.reason for left in found.excluded} == {"nan-run": "NaN", "late": "unfinished"}
    assert "left out: nan-run: NaN" in capsys.readouterr().out
    assert any("NaN" in reason for reason in found.provisional_reasons)


def test_a_loss_is_interpolated_and_never_extrapolated():
    tokens = np.geomspace(1e6, 1e8, 9)
    loss, none = 20 * tokens**-0.1, np.full(9, np.nan)
    assert loss_at(tokens, loss, none, 3e7, 1.25)[0] == pytest.approx(20 * 3e7**-0.1)
    assert loss_at(tokens, loss, none, 3e7, 4.0)[0] == pytest.approx(20 * 3e7**-0.1)
    assert loss_at(tokens, loss, none, 2e8, 4.0) is None
    assert loss_at(tokens, loss, none, 5e5, 4.0) is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", b"", "no rising count"),
        ("metrics.jsonl", b"\xff\xfe garbage\n{]\n", "no rising count"),
        ("metrics.jsonl", b'{"step": 1, "tokens": "many"}\n{"step": 2, "tokens": 9}\n', "no rising count"),
        ("metrics.jsonl", b'{"step": 1, "tokens": 9}\n{"step": 2, "tokens": 5}\n', "no rising count"),
        ("metrics.jsonl", b'{"step": 1' * 200000, "no rising count"),
        ("config.yaml", b"- a\n- b\n", "not YAML"),
        ("config.yaml", b"\xff\xff", "not YAML"),
        ("config.yaml", b"a: [" * 5000, "not YAML"),
        ("config.yaml", b"model: {layers: -3, hidden: x}\n", "no positive whole number"),
    ],
)
def test_a_hostile_run_folder_is_left_out_and_the_others_are_fitted(name, content, said, tmp_path):
    runs = clean_sweep(tmp_path)
    bad = write_run(tmp_path / "bad", 2, 96, seed=9)
    (bad / name).write_bytes(content)
    found = from_runs([*runs, bad], min_steps=100)
    assert [(left.run, left.reason) for left in found.excluded] == [(str(bad), "unreadable")]
    assert said in found.excluded[0].detail
    assert len({point.run for point in found.counted}) == 7
    assert from_runs([bad], min_steps=100).points == ()


@pytest.mark.parametrize("norm", ["full", "head", "none"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_flops_per_token_are_those_that_the_trainer_counts(norm, has_bias):
    from megadiff.model.cost import Shape, flops_per_token

    shape = Shape(layers=3, hidden=96, heads=4, vocab_size=2, seq_length=64, qk_norm=norm, mlp_bias=has_bias)
    names = ("layers", "hidden", "heads", "seq_length", "qk_norm", "mlp_bias")
    settings = {f"model.{name}": getattr(shape, name) for name in names} | {"model.ffn_multiple": 4}
    for count in ("deepseek", "chinchilla"):
        assert flops_per_token_of(settings, count) == flops_per_token(shape, count)
