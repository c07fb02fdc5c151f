"""Models of a study on a CPU, down to one layer of width 16: they train, and cost what the formulas say."""

from __future__ import annotations

import math

import pytest

from megadiff.model import cost
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, read_metrics, toy_config, wire_on_rank

GRID = ("1x16x1", "1x16x2", "2x16x1", "2x20x1", "2x24x3", "2x32x1", "3x32x4", "3x40x1", "3x48x3", "4x48x6", "4x56x1")
GRID += ("4x64x4", "4x80x1", "4x96x6")
"""Layers, width, heads."""
BLOCK = {f"model__{key}": value for key, value in GIDD_BLOCK.items()}
VOCABULARY = 260


def _train(configs):
    """Train each model for its step; numbers of parameters."""
    counted = []
    for config in configs:
        run = wire_on_rank(config, 1)
        counted.append(sum(weight.numel() for chunk in run.step.chunks for weight in chunk.parameters()))
        run.train()
    return counted


@pytest.fixture(scope="module")
def trained(toy_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    configs = {}
    for name in GRID:
        layers, width, heads = map(int, name.split("x"))
        configs[name] = toy_config(
            toy_corpus,
            folder,
            name=name,
            model={"layers": layers, "hidden": width, "heads": heads, "seq_length": 64, "vocab_multiple": 1},
            batch={"global_batch_size": 4, "micro_batch_size": 4},
            schedule={"steps": 2, "warmup_steps": 0},
            data__valid=[],
            checkpoint__every=1000,
            **BLOCK,
        )
    counted = on_ranks(1, _train, list(configs.values()))[0]
    return {name: (config, count) for (name, config), count in zip(configs.items(), counted, strict=True)}


@pytest.mark.parametrize("name", GRID)
def test_a_narrow_model_takes_steps_and_has_the_size_counted(trained, name):
    config, counted = trained[name]
    assert counted == cost.parameters(config.shape(vocab_size=VOCABULARY)).total
    first, second = read_metrics(config.folder / "metrics.jsonl")
    assert first["elbo"] == pytest.approx(math.log(VOCABULARY - 1), rel=0.3)
    assert math.isfinite(second["loss"])
    assert second["grad_norm"] > 0
    assert first["flops"]["deepseek"] == 256 * cost.flops_per_token(config.shape(vocab_size=VOCABULARY), "deepseek")
