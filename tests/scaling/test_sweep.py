"""A sweep's description becomes runs, each with the budgets that it serves; what is wrong with it is said by line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megadiff.errors import ConfigError
from megadiff.scaling.flops import flops_per_token
from megadiff.scaling.laws import published
from megadiff.scaling.sweep import Sweep, read_sweep
from megadiff.scaling.sweep_runs import BaseRun, expand

BASE = BaseRun(
    seq_length=2048,
    warmup_steps=100,
    micro_batch_size=4,
    save_every=1000,
    flops_per_token=lambda shape, count: flops_per_token(
        shape.layers, shape.hidden, 2048, method=count, vocab_size=131072
    ),
)
TREE = {
    "name": "a",
    "run": "run.yaml",
    "noises": ["masked", "uniform"],
    "sizes": {"shapes": ["8x512x8", "12x768x12", "16x1024x16"]},
    "budgets": {"flops": [1e18, 4e18]},
    "grid": [{"sequences": [64], "learning_rates": [0.5]}],
}


def described(**changes) -> Sweep:
    return Sweep.model_validate({**TREE, **changes})


def runs_of(**changes):
    return expand(described(**changes), BASE, published()).runs


def test_one_run_serves_all_budgets_and_ends_at_the_last():
    runs = runs_of(noises=["masked"])
    assert [run.name for run in runs] == [
        "masked-L8-D512-b64-lr0.5-s0", "masked-L12-D768-b64-lr0.5-s0", "masked-L16-D1024-b64-lr0.5-s0",
    ]  # fmt: skip
    for run in runs:
        assert run.budgets == (1e18, 4e18)
        size = flops_per_token(run.shape.layers, run.shape.hidden, 2048)
        assert run.steps == math.ceil(4e18 / size / (64 * 2048))
        assert run.flops == pytest.approx(4e18, rel=1e-2)
        assert run.flops >= 4e18
    assert "eval.at_flops=[1e+18, 4e+18]" in [setting.replace(".0e", "e") for setting in runs[0].settings]


def test_a_budget_has_the_sizes_near_its_optimum():
    """M* of masked noise is 2.75e8 at 1e18, and 6.03e8 at 4e18; the sizes are 2.5e8, 7.1e8 and 1.5e9."""
    budgets = {run.shape.layers: run.budgets for run in runs_of(budgets={"flops": [1e18, 4e18], "within": 2})[:3]}
    assert budgets[8] == (1e18,)
    assert budgets[12] == (4e18,)
    assert 16 not in budgets or budgets[16] == ()
    found = expand(described(budgets={"flops": [1e18, 4e18], "within": 2}), BASE, published())
    assert "16x1024x16 serves no budget and is left out" in found.remarks


def test_batches_and_rates_are_multiples_of_the_laws():
    """Laws are read at the middle of the tokens, 2e18 / M: B* = 10^-2.4 D^0.8225 and eta* = 10^-2.06 B^0.3412."""
    grid = [{"batches_of_law": [0.5, 1, 2], "rates_of_law": [0.7, 1.4]}]
    runs = runs_of(noises=["next_token"], sizes={"shapes": ["8x512x8"]}, grid=grid)
    tokens = 2e18 / flops_per_token(8, 512, 2048)
    best = 10**-2.4 * tokens**0.8225
    assert sorted({run.sequences for run in runs}) == [round(k * best / 2048) for k in (0.5, 1, 2)]
    for run in runs:
        law = 10**-2.06 * run.batch_tokens**0.3412
        assert run.learning_rate / law in (pytest.approx(0.7, rel=1e-2), pytest.approx(1.4, rel=1e-2))
    assert len(runs) == 6
    odd = [run for run in runs if run.sequences % 4]
    assert all(f"batch.micro_batch_size={math.gcd(run.sequences, 4)}" in run.settings for run in odd)


def test_sizes_of_a_range_lie_a_factor_apart():
    sizes = {"range": {"smallest": 2e8, "largest": 3e9, "factor": 1.5}}
    found = [run.flops_per_token for run in runs_of(noises=["masked"], sizes=sizes)]
    assert len(found) == 8
    for size, wanted in zip(found, [2e8 * 1.5**k for k in range(8)], strict=True):
        assert abs(math.log(size / wanted)) < math.log(1.5) / 2


def test_a_fixed_length_serves_the_budgets_that_it_reaches():
    grid = [
        {"sequences": [64], "learning_rates": [0.5], "steps": 20000},
        {"sequences": [8], "learning_rates": [0.5], "steps": 500},
    ]
    runs = runs_of(noises=["masked"], sizes={"shapes": ["8x512x8"]}, grid=grid)
    assert [(run.steps, run.budgets) for run in runs] == [(20000, ()), (500, ())]
    long = runs_of(noises=["masked"], sizes={"shapes": ["16x1024x16"]}, grid=grid[:1])
    assert [(run.steps, run.budgets) for run in long] == [(20000, (1e18, 4e18))]


def test_runs_of_a_fixed_length_without_budget_are_counted():
    grid = [{"sequences": [8], "learning_rates": [0.5, 1], "steps": 500, "shapes": ["8x512x8"]}, *TREE["grid"]]
    cooldowns = [{"shapes": ["12x768x12"], "length": 0.2}]
    found = expand(described(grid=grid, cooldowns=cooldowns), BASE, published())
    said = "4 runs serve no budget and are trained for the `steps` of the grid alone: 8x512x8"
    assert [text for text in found.remarks if "no budget" in text] == [said]
    assert not any("no budget" in text for text in expand(described(), BASE, published()).remarks)


def test_nothing_counts_before_three_warmups():
    grid, sizes = [{"sequences": [16384], "learning_rates": [1]}], {"shapes": ["8x512x8"]}
    found = expand(described(grid=grid, sizes=sizes), BASE, published())
    assert all(run.budgets == (4e18,) for run in found.runs)
    assert any("nothing counts before step 300, 3 warm-ups: 1e+18 FLOPs in 1 run" in text for text in found.remarks)


def test_budgets_that_repeat_too_little_data_are_named():
    """At 1e18 FLOPs the three sizes train on 4.0e9, 1.4e9 and 0.7e9 tokens, and on 4 times as many at 4e18."""
    base = replace(BASE, different_tokens=lambda tokens: min(tokens, 2e9))
    found = expand(described(), base, published())
    said = "more than 1.5 times, 1e+18 FLOPs in 1 run, 4e+18 FLOPs in 2 runs"
    assert [text for text in found.remarks if "data.train" in text and text.endswith(said)] == [
        f"data.train holds too little: a fit leaves out losses of tokens seen {said}"
    ]
    assert found.runs == expand(described(), BASE, published()).runs
    assert not any("data.train" in text for text in expand(described(), BASE, published()).remarks)


def test_seeds_and_cooldowns_of_chosen_runs():
    changes = {
        "more_seeds": [{"add": [1, 2], "shapes": ["12x768x12"], "noises": ["uniform"]}],
        "cooldowns": [{"shapes": ["8x512x8"], "noises": ["masked"], "length": 0.2}],
    }
    runs = {run.name: run for run in runs_of(**changes)}
    assert [run.seed for run in runs.values() if run.noise == "uniform" and run.shape.layers == 12] == [0, 1, 2]
    (branch,) = [run for run in runs.values() if run.trunk is not None]
    trunk = runs[branch.trunk]
    assert branch.name == f"{trunk.name}-cooldown0.2"
    assert branch.steps == trunk.steps
    assert branch.first_step == pytest.approx(0.8 * trunk.steps, rel=0.01)
    (every,) = [int(s.split("=")[1]) for s in trunk.settings if s.startswith("checkpoint.every=")]
    assert branch.first_step % every == 0
    assert f"schedule.decay_steps={trunk.steps - branch.first_step}" in branch.settings
    assert branch.tokens == (trunk.steps - branch.first_step) * 64 * 2048


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noises": ["maskd"]}, r"noises.*`maskd` is no noise; did you mean `masked`\?"),
        ({"noises": ["masked", "masked"]}, "the noise masked is there twice"),
        ({"sizes": {}}, "give either `shapes` or `range`"),
        ({"sizes": {"shapes": ["8x512"]}}, "a shape is written LAYERSxWIDTHxHEADS"),
        ({"sizes": {"shapes": ["8x512x7"]}}, "the 7 heads of 8x512x7 do not divide its width 512"),
        ({"sizes": {"shapes": ["8x512x8", "8x512x4"]}}, "two shapes have 8 layers of width 512"),
        ({"budgets": {"flops": []}}, "flops is empty"),
        ({"budgets": {"flops": [1e18, -1]}}, "flops must be above 0, found -1"),
        ({"budgets": {"flops": [1e18], "within": 0.5}}, "within is a factor above 1"),
        ({"budgets": {"flops": [1e18], "flop_count": "deepseak"}}, "did you mean `deepseek`"),
        ({"grid": [{"sequences": [8]}]}, "give exactly one of learning_rates, rates_of_law; found none"),
        ({"grid": [{"sequences": [8], "tokens": [8], "learning_rates": [1]}]}, "found sequences and tokens"),
        ({"seeds": [0, 0]}, "seeds are different whole numbers"),
        ({"cooldowns": [{"noises": ["balanced"]}]}, "cooldowns names the noise balanced"),
        ({"more_seeds": [{"add": [1], "shapes": ["1x1x1"]}]}, "more_seeds names the shape 1x1x1"),
        ({"size": 3}, "unknown key `size`"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path: Path, changes, said):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**TREE, **changes}))
    with pytest.raises(ConfigError, match=rf"(?s)sweep.yaml:\d+: .*{said}"):
        read_sweep(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noises": ["next_token"], "budgets": {"flops": [1e18], "within": 4}}, "no law file has flops_per_token"),
        ({"grid": [{"tokens": [3000], "learning_rates": [1]}]}, "3000 tokens is no multiple of the 2048"),
        ({"sizes": {"range": {"smallest": 1e3, "largest": 1e3, "factor": 2}}}, "no usual shape has about 1e"),
        ({"budgets": {"flops": [1e3]}}, "no run serves any budget"),
        ({"grid": TREE["grid"] * 2}, "two runs would be named masked-L8-D512-b64-lr0.5-s0"),
    ],
)
def test_descriptions_without_runs_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        runs_of(**changes)
