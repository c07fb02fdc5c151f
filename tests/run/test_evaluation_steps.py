"""Evaluations at named steps and budgets: when they are due, and what is refused or warned of."""

from __future__ import annotations

import json
import shutil

import pytest
from pydantic import ValidationError

from megadiff.errors import ConfigError
from megadiff.model import cost
from megadiff.platform.quiet import quiet
from megadiff.run.summary import evaluation_advice, evaluation_times
from megadiff.scaling import paired
from megadiff.scaling.flops import FLOP_COUNTS
from tests.support.ranks import on_ranks
from tests.support.runs import read_metrics, toy_config, train_all

with quiet():
    from megadiff.run.check import check

RAMPUP = {"start": 4, "increment": 2, "every_steps": 3}


@pytest.mark.parametrize("count", FLOP_COUNTS)
@pytest.mark.parametrize("rampup", [None, RAMPUP])
def test_a_budget_is_reached_by_the_first_step_that_covers_it(toy_corpus, tmp_path, count, rampup):
    config = toy_config(
        toy_corpus,
        tmp_path,
        schedule__steps=40,
        schedule__flop_count=count,
        data__vocab_size=260,
        batch__rampup=rampup,
    )
    each = cost.flops_per_token(config.shape(vocab_size=260), count)
    flops = [config.tokens_before(step) * each for step in range(41)]  # as in metrics.jsonl
    for step in range(1, 41):
        assert config.step_of_flops(flops[step]) == step
        assert config.step_of_flops(flops[step] * (1 + 1e-9)) == step + 1
        assert config.step_of_flops((flops[step - 1] + flops[step]) / 2) == step


def test_the_budget_of_the_whole_run_is_its_last_step(toy_corpus, tmp_path):
    for flops in (1.7e9, 3e9 / 7, 1e12 / 3):
        length = {"steps": None, "flops": flops, "warmup_steps": 0}
        config = toy_config(toy_corpus, tmp_path, schedule=length, eval__at_flops=[flops])
        assert config.evaluation_steps == {config.steps}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval__at_steps": [3, 11]}, r"at_steps has 11, but the run ends after 10 steps \(schedule.steps = 10\)"),
        ({"eval__at_flops": [1e3, 1e12]}, r"at_flops has 1e\+12 FLOPs, but the run reaches 411648000 \(schedule.s"),
        (
            {"eval__at_flops": [1e3], "schedule__flop_count": "full"},
            "eval.at_flops with schedule.flop_count=full counts the head, whose size needs data.vocab_size",
        ),
        ({"eval__at_steps": [0]}, "greater than 0"),
        ({"eval__at_flops": [-1.0]}, "greater than 0"),
        ({"eval__at_flops": [float("inf")]}, "finite"),
    ],
)
def test_an_evaluation_that_never_comes_is_refused(toy_corpus, tmp_path, keys, message):
    with pytest.raises((ValidationError, ConfigError), match=message):
        toy_config(toy_corpus, tmp_path, **keys)


def test_evaluations_inside_the_warm_up_are_named_once(toy_corpus, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = toy_config(toy_corpus, tmp_path, eval__at_steps=[9, 1, 2], schedule__warmup_steps=2)
    assert evaluation_times(config) == ["evaluation        also at step(s) 1, 2, 9"]
    assert len(evaluation_advice(config)) == 1
    text = check(config)
    assert text.count("warning           eval.at_steps and eval.at_flops name step(s) 1, 2, inside the learning") == 1
    assert evaluation_advice(toy_config(toy_corpus, tmp_path, eval__at_steps=[3], eval__every=1)) == []


def _resumed(configs):
    """Train the first to its end, and the second from the first's checkpoint of step 4."""
    whole, killed = configs
    train_all([whole], 1, save=True)
    shutil.copytree(whole.folder, killed.folder)
    shutil.rmtree(killed.folder / "checkpoints" / "step_00000008")
    (killed.folder / "LATEST").write_text("step_00000004\n")
    train_all([killed], 1, save=True)


def test_named_evaluations_come_once_also_over_a_resume(toy_corpus, tmp_path):
    each = cost.flops_per_token(toy_config(toy_corpus, tmp_path).shape(vocab_size=260), "deepseek")
    keys = {
        "schedule__steps": 8,
        "checkpoint__every": 4,
        "eval__at_steps": [3, 5],
        "eval__at_flops": [5.5 * 128 * each, 4 * 128 * each],
        "eval__samples": 1,
        "eval__sample_steps": 2,
    }
    configs = [toy_config(toy_corpus, tmp_path / name, **keys) for name in ("whole", "killed")]
    on_ranks(1, _resumed, configs)
    found = [read_metrics(config.folder / "metrics.jsonl") for config in configs]
    evaluations = [[line for line in lines if "eval_elbo" in line] for lines in found]
    assert [line["step"] for line in evaluations[0]] == [0, 3, 4, 5, 6, 8]
    assert evaluations[0] == evaluations[1]
    flops = {line["step"]: line["flops"]["deepseek"] for line in found[0] if "flops" in line}
    assert flops[5] < 5.5 * 128 * each <= flops[6]
    kept = [(config.folder / "validation.jsonl").read_text() for config in configs]
    assert kept[0] == kept[1]
    figures = [paired.read(config.folder) for config in configs]
    for line in evaluations[1]:
        found = figures[1][line["step"]]
        assert len(found.elbo) == 7
        assert found.mean == pytest.approx(line["eval_elbo"], abs=1e-6)
        assert paired.compare(found, figures[0][line["step"]]).difference == 0
    set_aside = (configs[1].folder / "validation.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in set_aside] == [5, 6, 8]
    assert set_aside == kept[0].splitlines()[3:]
    drawn = sorted(path.name for path in (configs[1].folder / "samples").iterdir())
    assert drawn == [f"step_{step:08d}.txt" for step in (0, 3, 4, 5, 6, 8)]
    assert "also at step(s)" not in "".join(evaluation_times(toy_config(toy_corpus, tmp_path)))
