"""`megadiff sweep` as a user calls it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megadiff.data.facts import read_data_facts
from tests.support.commands import REPOSITORY, call
from tests.support.forked_command import call_forked
from tests.support.sweeps import write_description

SCRIPT = "tools/sweep.py"


@pytest.fixture
def description(toy_corpus, tmp_path):
    return write_description(tmp_path, toy_corpus, sizes={"shapes": ["1x16x2", "1x32x2"]})


def test_a_sweep_is_written_checked_trained_and_watched(description, tmp_path):
    """The worker is started as that of a user is."""
    folder = tmp_path / "elsewhere"
    written = call_forked(SCRIPT, "write", description, "--output", folder, "seeds=[0]")
    assert written.code == 0, written.err
    assert f"written           {folder}: 2 runs, 2 of them new" in written.out
    assert f"submit            slurm/submit sweep --config {folder}/base.yaml --rows {folder}/rows.txt" in written.out
    for path in sorted((folder / "descriptions").iterdir()):
        assert call_forked("pretrain_dlm.py", "--check", "--config", path).code == 0
    rows = ("--config", folder / "base.yaml", "--rows", folder / "rows.txt", "--time", "10", "--dry-run")
    submitted = call_forked("slurm/submit", "sweep", *rows)
    assert submitted.code == 0, submitted.err
    assert "--array=0-1 " in submitted.out
    assert submitted.out.count("# task ") == 2
    for named in (folder, folder / "runs"):
        (folder / "runs").mkdir(exist_ok=True)
        assert call_forked(SCRIPT, "status", named).out == "masked        2 missing\n"
    for words, said in (
        (("write", folder), "and `write` needs its description"),
        (("run", folder, "--local", "seeds=[1]"), "and `seeds=[1]` needs its description"),
        (("run", folder, "--dry-run"), "and `--dry-run` needs its description"),
        (("run", folder), "give --local to train on this machine"),
        (("run", folder, "--local", "--jobs", "0"), "--jobs must be above 0"),
    ):
        refused = call_forked(SCRIPT, *words)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused.err
        assert said in refused.err

    code, out, err = call(SCRIPT, "run", folder, "--local", "--jobs", "1")

    assert code == 0, err
    assert "2 missing; 1 at a time" in out
    assert "[2/2] masked-L1-D32-b8-lr0.002-s0 finished after step 8 of 8, " in out
    facts = read_data_facts(folder / "runs/masked-L1-D32-b8-lr0.002-s0")
    assert facts is not None
    assert facts.vocab_size == 260
    finished = call_forked(SCRIPT, "status", folder, "--all")
    by_description = call_forked(SCRIPT, "status", description)
    assert f"{description.parent}/small is no folder of a sweep" in by_description.err
    assert finished.out.startswith("masked        2 finished\n")
    assert "masked-L1-D16-b8-lr0.002-s0  finished               29/29" in finished.out


def test_the_dry_run_of_the_papers_sweep_prints_cost_and_power(tmp_path):
    dry = call_forked(
        SCRIPT, "write", "examples/scaling/paper.yaml", "--dry-run", "--run-noise", "0.001", "--draws", "50",
        "--output", tmp_path / "none",
    )  # fmt: skip
    assert dry.code == 0, dry.err
    assert "510 runs; 5 sizes, 9 budgets from 5e+17 to 2e+20 FLOPs (deepseek)" in dry.out
    total = next(line for line in dry.out.splitlines() if line.startswith("total")).split()
    assert total[1] == "510"
    flops = float(total[3])
    assert float(total[4].replace(",", "")) == pytest.approx(flops / (989e12 * 0.4 * 3600), rel=1e-3)
    assert "masked         0.566 +- 0.0" in dry.out
    assert "told apart        chance that a sweep tells the exponents of M* apart: masked and low_uniform" in dry.out
    assert "cheaper           " in dry.out
    assert not (tmp_path / "none").exists()


def test_the_mini_study_has_seven_sizes_a_budget():
    from megadiff.run.sweep_folder import plan_sweep

    plan = plan_sweep(REPOSITORY / "examples/scaling/mini.yaml")
    assert plan.expansion.noises == ["masked", "uniform", "next_token"]
    for noise in plan.expansion.noises:
        own = [run for run in plan.runs if run.noise == noise]
        budgets = sorted({flops for run in own for flops in run.budgets})
        assert len(budgets) == 5
        for flops in budgets:
            assert 6 <= len({run.shape for run in own if flops in run.budgets}) <= 9
        assert all(run.flops == pytest.approx(run.budgets[-1], rel=2e-3) for run in own)
        assert sum(run.seed > 0 for run in own) == (23 if noise == "uniform" else 4)
    assert {run.batch_tokens for run in plan.runs} == {2048}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "arguments are required: action"),
        (("trian",), "invalid choice: 'trian'"),
        (("run", "{}"), "give --local to train on this machine; on a cluster, write the sweep"),
        (("write", "{}", "--mfu", "40"), "--mfu is a share of the peak, at most 1, found 40"),
        (("write", "{}", "--run-noise", "2"), "--run-noise is a standard deviation of log loss"),
        (("run", "{}", "--local", "--jobs", "0"), "--jobs must be above 0"),
        (("write", "{}", "--dry-run", "--gpu", "H1000"), "the GPU `H1000` is not known"),
        (("write", "{}", "--dryrun"), "did you mean `--dry-run`?"),
        (("write", "nothing.yaml"), "nothing.yaml: the run description does not exist"),
        (("status", "/nothing"), "/nothing is no folder of a sweep"),
        (("run", "docs", "--local"), "docs is no folder of a sweep: it has no sweep.json"),
        (("write", "examples/demo.yaml"), "this is the description of a run, not of a sweep"),
    ],
)
def test_mistakes_have_one_sentence(description, words, said):
    ended = call_forked(SCRIPT, *(str(description) if word == "{}" else word for word in words))
    assert (ended.code, len(ended.err.splitlines())) == (2, 1), ended.err
    assert said in ended.err


def test_a_plan_and_a_status_load_nothing_that_trains(description, tmp_path):
    code = (
        "import sys; from pathlib import Path; from megadiff.run.sweep_folder import plan_sweep, write_sweep;"
        "from megadiff.run.sweep_folder import states; import megadiff.run.sweep_pool;"
        f"plan = plan_sweep(Path({str(description)!r})); write_sweep(plan); states(plan.folder);"
        "print(*{'torch', 'megatron'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
