"""Planned runs: what is written is what `--check` accepts, in the memory and at the cost that the plan stated."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from megadiff.config.load import load_config
from megadiff.errors import ConfigError
from megadiff.platform.gpus import GPUS, gpu
from megadiff.run.config import RunConfig
from megadiff.run.planned import MEMORY_SHARE, description, fitting_number, planned_run, run_tree
from megadiff.run.summary import checkpoint_bytes, memory_per_rank, run_summary
from megadiff.scaling.goal import Goal, Hardware
from megadiff.scaling.laws import NOISES, published
from tests.support.commands import REPOSITORY

BOOK = published()


def random_goal(draw: random.Random) -> tuple[Goal, int]:
    """Return a goal with GPUs, and the GPUs of a node."""
    per_node = draw.choice((4, 8))
    number = draw.choice((1, 2, per_node, 2 * per_node, 3 * per_node, 16 * per_node))
    hardware = Hardware(draw.choice(GPUS), number, draw.uniform(0.2, 0.6))
    flops = 10 ** draw.uniform(17.5, 18.5 + math.log10(number))
    tokens = flops**0.45 * 25
    given = draw.choice(
        (
            {"flops": flops},
            {"flops": flops, "tokens": tokens * draw.uniform(0.2, 2)},
            {"flops": flops, "flop_count": "full"},
            {"tokens": tokens},
            {"params": 10 ** draw.uniform(7.5, 9)},
            {"loss": draw.uniform(2.7, 3.3)},
        )
    )
    sizes = {"seq_length": draw.choice((512, 1024, 2048)), "vocab_size": draw.choice((260, 32_000, 131_072))}
    return Goal(draw.choice(NOISES), hardware=hardware, **given, **sizes), per_node


@pytest.mark.parametrize("seed", range(30))
def test_a_random_plan_passes_the_check_in_the_memory_it_states(seed, tmp_path):
    goal, per_node = random_goal(random.Random(seed))
    run = planned_run(goal, BOOK, gpus_per_node=per_node)
    path = tmp_path / "plan.yaml"
    path.write_text(description(run_tree(run, name="planned", with_paper=True), comment=["a comment"], base=None))
    config = load_config(path, ["transformer_impl=local"], RunConfig)
    ranks = goal.hardware.number
    assert run.layout.ranks == ranks
    layout = config.layout(world_size=ranks, vocab_size=goal.vocab_size)
    shape = config.shape(vocab_size=goal.vocab_size)
    memory = memory_per_rank(config, layout, shape)
    assert memory.total == run.layout.bytes_per_rank <= MEMORY_SHARE * goal.hardware.gpu.memory_bytes
    assert checkpoint_bytes(config, shape) == run.checkpoint_bytes
    assert run_summary(config, layout, shape)
    made = run.plan
    assert (config.steps, config.tokens_before(config.steps)) == (made.steps, made.tokens)
    assert (config.model.layers, config.model.hidden, config.model.heads) == (
        *(made.size.layers, made.size.hidden, made.size.heads),
    )
    assert config.optimizer.lr == pytest.approx(made.learning_rate, rel=5e-3)
    assert config.noise.shift == made.goal.noise
    assert config.lr_schedule().decay_start == made.steps - made.decay_steps
    assert run.gpu_hours == pytest.approx(
        made.flops("full") / (goal.hardware.gpu.peak_flops * goal.hardware.utilisation) / 3600
    )


def test_a_planned_run_is_the_papers_preset(tmp_path):
    """Every key that the preset sets has its value, but for those that a plan decides."""
    run = planned_run(Goal("masked", flops=1e19, hardware=Hardware(gpu("h100"), 8, 0.4)), BOOK, gpus_per_node=8)
    path = tmp_path / "plan.yaml"
    tree = run_tree(run, name="planned", with_paper=True)
    path.write_text(description(tree, comment=[], base=None))
    config = load_config(path, [], RunConfig).model_dump()
    decided = {("schedule", "decay_steps"), ("schedule", "warmup_steps"), ("optimizer", "beta2")}
    preset = yaml.safe_load((REPOSITORY / "examples/presets/gidd.yaml").read_text())
    for section, settings in preset.items():
        for key, value in settings.items():
            if (section, key) not in decided:
                assert config[section][key] == (float(value) if key in ("eps", "norm_eps") else value), (section, key)


def test_a_base_file_gives_what_a_plan_does_not_decide(tmp_path):
    run = planned_run(Goal("masked", flops=1e18, hardware=Hardware(gpu("h100"), 8, 0.4)), BOOK, gpus_per_node=8)
    (tmp_path / "base.yaml").write_text(
        "model: {softcap: null, qk_norm: head}\noptimizer: {name: adamw}\n"
        "data: {train: [mine], tokenizer: byte}\nbatch: {micro_batch_size: 3}\n"
    )
    (tmp_path / "plan.yaml").write_text(
        description(run_tree(run, name="own", with_paper=False), comment=["x"], base="base.yaml")
    )
    config = load_config(tmp_path / "plan.yaml", [], RunConfig)
    assert (config.model.softcap, config.model.qk_norm, config.optimizer.name) == (None, "head", "adamw")
    assert config.data.train[0].path == "mine"
    assert config.batch.micro_batch_size == run.layout.micro_batch_size


def test_a_large_run_takes_more_of_the_model_apart_on_smaller_gpus():
    goal = Goal("uniform", flops=1e22, hardware=Hardware(gpu("h200"), 128, 0.4))
    wide = planned_run(goal, BOOK, gpus_per_node=8).layout
    narrow = planned_run(replace(goal, hardware=Hardware(gpu("a100-40gb"), 128, 0.4)), BOOK, gpus_per_node=8).layout
    assert wide.tensor * wide.pipeline < narrow.tensor * narrow.pipeline or narrow.recompute != wide.recompute
    assert narrow.bytes_per_rank < MEMORY_SHARE * 40e9 < wide.bytes_per_rank


def test_the_fewest_gpus_that_hold_a_run_are_found():
    goal = Goal("uniform", flops=1e22, hardware=Hardware(gpu("h100"), 1, 0.4))
    found = fitting_number(goal, BOOK, gpus_per_node=8)
    assert found.layout.ranks > 1
    fewer = replace(goal, hardware=Hardware(gpu("h100"), found.layout.ranks // 2, 0.4))
    with pytest.raises(ConfigError, match=r"no layout of L\d+-D\d+ or a shape like it fits on \d+ H100 with 63.3 GiB"):
        planned_run(fewer, BOOK, gpus_per_node=8)


def test_gpus_that_do_not_fill_nodes_are_refused():
    goal = Goal("uniform", flops=1e19, hardware=Hardware(gpu("h100"), 12, 0.4))
    with pytest.raises(ConfigError, match="12 GPUs do not fill nodes of 8"):
        planned_run(goal, BOOK, gpus_per_node=8)


def test_the_save_interval_shrinks_with_the_number_of_gpus():
    def seconds(number: int) -> float:
        hardware = Hardware(gpu("h100"), number, 0.4)
        run = planned_run(Goal("uniform", flops=1e21, hardware=hardware), BOOK, gpus_per_node=8)
        return run.save_steps * run.hours * 3600 / run.plan.steps

    assert 300 < seconds(1024) < seconds(64) < 24 * 3600


def test_planning_loads_neither_torch_nor_megatron():
    code = (
        "import sys; from megadiff.run.planned import *; from megadiff.scaling.laws import published;"
        "from megadiff.scaling.goal import *; from megadiff.platform.gpus import gpu;"
        "planned_run(Goal('masked', flops=1e19, hardware=Hardware(gpu('h100'), 8, 0.4)), published(), gpus_per_node=8);"
        "print(*{'torch', 'megatron', 'numpy', 'scipy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
