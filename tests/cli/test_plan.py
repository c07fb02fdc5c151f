"""The command `plan`: its table, its lines, the file it writes, and mistakes in one sentence."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import yaml

from megadiff.errors import ConfigError, MegadiffError
from megadiff.run.config import RunConfig
from megadiff.run.dry_runs import Fullest, Refused
from megadiff.scaling.laws import Estimate, Excluded, Law, LawFile, write_law_file
from tests.support.commands import REPOSITORY
from tests.support.forked_command import call_forked


def _dry_run_in_this_process() -> None:
    """Have dry runs made here: the process that the command starts for them imports for eight CPU seconds."""
    from megadiff.run import dry_runs

    def answered(runs: Sequence[tuple[RunConfig, int]], limit_s: float) -> list[Fullest | Refused]:
        answers: list[Fullest | Refused] = []
        for config, ranks in runs:
            try:
                answers.append(dry_runs.fullest_rank(config, ranks=ranks))
            except MegadiffError as error:
                answers.append(Refused(str(error)))
        return answers

    dry_runs.dry_runs = answered


def plan(*words: str, before: Callable[[], None] | None = None) -> str:
    """Return what the command prints that ends well."""
    ended = call_forked("tools/plan.py", *words, before=before)
    assert ended.code == 0, ended.out + ended.err
    return ended.out


def line(text: str, label: str) -> str:
    """Return the rest of the first line with a label."""
    return next(found.removeprefix(label).strip() for found in text.splitlines() if found.startswith(label))


ROWS = [
    ("1e18", "masked", "2.75e+08", "3.64e+09", "3.482", "3.399", "2.91e+05", "142", "0.64", 12_504),
    ("1e20", "masked", "3.73e+09", "2.68e+10", "2.771", "2.705", "1.5e+06", "735", "1.12", 17_825),
    ("1e22", "masked", "5.06e+10", "1.98e+11", "2.205", "2.152", "7.78e+06", "3,798", "1.96", 25_410),
    ("1e18", "uniform", "2.45e+08", "4.08e+09", "3.594", "3.508", "3.2e+05", "156", "0.66", 12_763),
    ("1e20", "uniform", "3.69e+09", "2.71e+10", "2.826", "2.759", "1.52e+06", "742", "1.12", 17_862),
    ("1e22", "uniform", "5.55e+10", "1.8e+11", "2.222", "2.169", "7.21e+06", "3,521", "1.91", 24_999),
    ("1e23", "uniform", "2.15e+11", "4.65e+11", "1.971", "1.924", "1.57e+07", "7,672", "2.49", 29_574),
]


@pytest.mark.parametrize("flops", ["1e18", "1e20", "1e22", "1e23"])
def test_the_table_has_the_published_optima_of_all_noises(flops):
    out = plan("--flops", flops)
    found = {cells[0]: cells[1:] for cells in (row.split() for row in out.splitlines()) if len(cells) == 10}
    assert set(found) == {"masked", "low_uniform", "balanced", "high_uniform", "uniform"}
    for budget, noise, *cells, steps in ROWS:
        if budget == flops:
            assert found[noise][1:-1] == cells
            assert int(found[noise][-1].replace(",", "")) == pytest.approx(steps, abs=2)
    assert ("extrapolated      flops" in out) == (float(flops) > 2e20)


def test_the_second_count_has_laws_of_its_own():
    out = plan("--flops", "1e20", "--flop-count", "chinchilla")
    masked = next(row.split() for row in out.splitlines() if row.startswith("masked"))
    assert masked[2:5] == [f"{0.00340 * 1e20**0.59714:.3g}", f"{294.51814 * 1e20**0.40285:.3g}", "2.750"]
    assert f"{23.10227 * 1e20**-0.04622:.3f}" == "2.750"


def test_a_plan_states_size_run_loss_layout_and_price(tmp_path):
    output = tmp_path / "plan.yaml"
    words = ("--flops", "1e20", "--noise", "uniform", "--gpu", "h100", "--gpus", "64", "--tokens", "1e10")
    out = plan(*words, "--output", str(output), "--name", "mine")
    assert line(out, "optimum").startswith("of 1e+20 FLOPs (deepseek): M* 3.69e+09 FLOPs per token, D* 2.71e+10 tokens")
    assert "L* 2.826, 2.759 after a cooldown" in line(out, "optimum")
    assert re.search(r"^L\d+-D\d+: \d+ layers of width ", line(out, "shape"))
    assert re.fullmatch(r"deepseek \S+, chinchilla \S+, full \S+", line(out, "FLOPs per token"))
    assert re.search(r"steps, .* tokens, 2\.\d+ epochs of the 1e\+10 at hand", line(out, "run"))
    assert "beta2 0.98, warm-up 2,000 steps" in line(out, "learning rate")
    assert re.search(r"2\.\d{3} \[2\.\d{3}, 2\.\d{3}\] nats per token before the cooldown", line(out, "loss"))
    assert line(out, "layout").startswith("64 x H100: tensor 1 x pipeline 1 x data 64")
    assert re.search(r"about \S+ GiB of 74.5 GiB .* \(dry run of rank 0, local layers\)", line(out, "memory"))
    assert re.search(r"hours, \S+ GPU hours, at 40 % of 989 TFLOP/s", line(out, "time"))
    assert re.search(r"GiB, every \S+ steps", line(out, "checkpoint"))
    assert re.search(r"^tokens: .* costs 0\.1\d+ % of the loss", line(out, "bound"))
    submit = f"slurm/submit pretrain --config {output} --nodes 8 --gpus-per-node 8 --time "
    assert line(out, "submit").startswith(submit)
    written = output.read_text()
    assert f"# megadiff plan {shlex.join(words)}" in written
    assert yaml.safe_load(written)["name"] == "mine"
    checked = call_forked("pretrain_dlm.py", "--config", str(output), "--check", "--ranks", "64")
    assert checked.code == 0, checked.out + checked.err
    assert line(checked.out, "run ").startswith(line(out, "run").split(" tokens")[0])
    dry = subprocess.run(
        [sys.executable, *shlex.split(line(out, "submit")), "--dry-run"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert dry.returncode == 0, dry.stderr
    assert "sbatch" in dry.stdout


def test_a_plan_builds_on_a_base_file(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/base.yaml").write_text(
        "data: {train: [x], tokenizer: byte}\noptimizer: {name: laprop, parametrisation: completep}\n"
    )
    output = tmp_path / "plan.yaml"
    base = str(tmp_path / "own/base.yaml")
    goal = ("--flops", "1e18", "--noise", "masked")
    plan(*goal, "--vocab-size", "260", "--output", str(output), "--base", base, before=_dry_run_in_this_process)
    found = yaml.safe_load(output.read_text())
    assert found["base"] == "own/base.yaml"
    assert found["data"] == {"vocab_size": 260}
    words = (*goal, "--output", tmp_path / "other.yaml", "--base", base)
    other = call_forked("tools/plan.py", *words, before=_dry_run_in_this_process)
    assert other.code == 2
    assert "the tokenizer byte has 260 ids with its mask; set it to that" in other.err
    assert other.err.endswith("(here with --vocab-size)\n")


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("model: {mlp: swiglu}", "were planned: the laws are of the paper's block; leave out model.mlp, kv_heads"),
        ("optimizer: {parametrisation: standard}", "is a base rate of completep; set that"),
    ],
)
def test_a_base_of_another_model_or_rate_is_refused(tmp_path, base, sentence):
    (tmp_path / "base.yaml").write_text(f"data: {{train: [x], tokenizer: byte}}\n{base}\n")
    output = tmp_path / "plan.yaml"
    arguments = ("--flops", "1e18", "--noise", "masked", "--output", str(output), "--base", str(tmp_path / "base.yaml"))
    ended = call_forked("tools/plan.py", *arguments)
    assert ended.code == 2
    assert sentence in ended.err
    assert not output.exists()


def test_laws_of_ones_own_plan_and_say_that_they_are_provisional(tmp_path):
    power = {"of": "flops", "form": "power", "noise": "masked", "flop_count": "deepseek"}
    factors = {"loss": (30.0, -0.06), "tokens": (10.0, 0.5), "flops_per_token": (0.1, 0.5)}
    laws = tuple(
        Law(quantity=name, parameters={"A": Estimate(value=a), "alpha": Estimate(value=b)}, **power)
        for name, (a, b) in factors.items()
    )
    file = LawFile(
        name="mine",
        source="runs/mine",
        valid={"flops": (1e17, 1e19)},
        provisional=True,
        excluded=(Excluded(run="a", reason="diverged"),),
        laws=laws,
    )
    write_law_file(tmp_path / "laws.yaml", file)
    out = plan("--flops", "1e20", "--noise", "masked", "--laws", str(tmp_path / "laws.yaml"))
    assert "M* 1e+09 FLOPs per token, D* 1e+11 tokens" in out
    assert f"L* {30 * 1e20**-0.06:.3f}" in out
    assert "extrapolated      flops 1e+20 is above 1e+19" in out
    assert "remark            the laws of mine are provisional (1 run excluded)" in out
    assert "by the laws of gidd; mine has none of its own" in out
    assert "second method" not in out
    table = plan("--flops", "1e18", "--laws", str(tmp_path / "laws.yaml")).splitlines()
    assert [line.split()[0] for line in table if line] == ["noise", "masked", "M*", "remark", "remark"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            (),
            "nothing determines the run; give one or two of a budget (FLOPs, or GPUs and hours), tokens, a model size",
        ),
        (("--gpus", "8"), "nothing determines the run"),
        (("--flops", "1e20", "--noise", "maskd"), "the noise `maskd`; did you mean `masked`?"),
        (("--flops", "1e40"), "the goal needs 1e+40 FLOPs, but the laws hold between 5e+17 and 2e+20"),
        (("--flops", "many"), "argument --flops: wants a number, found 'many'"),
        (("--flops", "1e20", "--gpu", "tpu", "--noise", "masked"), "the GPU `tpu` is not known; there are H100, "),
        (("--hours", "3"), "--hours is a budget only with a number of GPUs; give --gpus too"),
        (("--flops", "1e20", "--layers", "3"), "--layers and --hidden go together"),
        (("--layers", "3", "--hidden", "600"), "--hidden must be even, and from 512 on a multiple of 64, found 600"),
        (("--layers", "3", "--hidden", "17"), "--hidden must be even, and from 512 on a multiple of 64, found 17"),
        (("--layers", "3", "--hidden", "64", "--params", "5"), "are both model sizes; leave one out"),
        (("--flops", "1e20", "--mfu", "40"), "--mfu is a share of the peak, at most 1, found 40"),
        (("--flops", "1e20", "--gpus", "0"), "--gpus must be above 0, found 0"),
        (("--flops", "1e20", "--output", "x.yaml"), "--output writes one run; give its noise with --noise"),
        (("--flops", "1e20", "--noise", "masked", "--output", "x.txt"), "a name that ends in .yaml is wanted"),
        (("--flops", "1e20", "--noise", "masked", "--output", "no/x.yaml"), "there is no folder no; make it"),
        (("--flops", "1e20", "--laws", "none.yaml"), "none.yaml: the law file does not exist"),
        (("--flops", "1e20", "--noise", "masked", "--batch-law", "x"), "no law of batch_tokens for masked noise (x)"),
        (
            ("--flops", "1e22", "--noise", "masked", "--gpus", "1"),
            "or a shape like it fits on 1 H100",
        ),
        (("--flops", "1e20", "--tokens", "1e9", "--loss", "3"), "cannot all hold; give at most two of them"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(words, sentence):
    ended = call_forked("tools/plan.py", *words)
    assert ended.code == 2
    assert sentence in ended.err
    assert ended.err.count("\n") == 1
    assert ended.out == ""


def _written(monkeypatch, tmp_path, answers):
    """Return the run that is written and its source, with a dry run's answer for every layout that is tried."""
    from megadiff.cli.plan import main
    from megadiff.run import dry_runs

    tried = []

    def answer(runs, limit_s):
        tried.append(runs[0])
        return [answers[min(len(tried), len(answers)) - 1]]

    monkeypatch.setattr(dry_runs, "dry_runs", answer)
    words = ["--flops", "1e20", "--noise", "masked", "--gpus", "64", "--output", str(tmp_path / "plan.yaml")]
    monkeypatch.setattr("sys.argv", ["plan", *words])
    main()
    return tried


def test_a_layout_that_a_dry_run_finds_too_large_is_planned_around(monkeypatch, tmp_path, capsys):
    answers = [Fullest(0, 90 * 2**30, ""), Fullest(3, 20 * 2**30, "")]
    (first, ranks), (second, _) = _written(monkeypatch, tmp_path, answers)
    assert ranks == 64
    assert (first.parallel, first.batch.micro_batch_size) != (second.parallel, second.batch.micro_batch_size)
    assert "about 20 GiB of 74.5 GiB on the fullest GPU (dry run of rank 3, local layers)" in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert written["batch"]["micro_batch_size"] == second.batch.micro_batch_size


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (Fullest(0, 90 * 2**30, ""), "by dry runs none of the 4 fastest layouts fits, .* the last needs 90 GiB of"),
        (Refused("model.heads is 4"), "a dry run refuses the planned run: model.heads is 4"),
    ],
)
def test_a_plan_that_no_dry_run_confirms_is_not_written(monkeypatch, tmp_path, answer, sentence):
    with pytest.raises(ConfigError, match=sentence):
        _written(monkeypatch, tmp_path, [answer])
    assert not (tmp_path / "plan.yaml").exists()


def test_a_plan_is_quick_and_loads_nothing_that_trains():
    code = (
        "import sys; sys.argv = ['plan', '--flops', '1e20', '--noise', 'masked'];"
        "from megadiff.cli.plan import main; main();"
        "print(*{'torch', 'megatron', 'numpy', 'scipy'} & set(sys.modules), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.split() == []
    assert after.ru_utime - before.ru_utime < 1.0


def test_the_page_shows_what_its_command_prints():
    page = (REPOSITORY / "docs/scaling.md").read_text()
    command = re.search(r"^megadiff plan (.*) --output plan\.yaml$", page, re.MULTILINE)
    shown = re.search(r"^```text\n(optimum.*?)```", page, re.MULTILINE | re.DOTALL)
    printed = plan(*shlex.split(command[1])).splitlines()
    assert [line for line in shown[1].splitlines() if line not in printed] == []
