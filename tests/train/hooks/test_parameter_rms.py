"""Root mean squares of the weights against a direct computation, on one rank and on two."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.ranks import on_ranks
from tests.support.runs import read_metrics, toy_config, wire_on_rank

TP2 = {"parallel__tensor": 2, "parallel__sequence": True, "model__mlp_bias": True}
LAYOUTS = {
    "one": (1, {"model__mlp_bias": True}),
    "tensor": (2, TP2),
    "pipeline": (2, {"parallel__pipeline": 2, "model__mlp_bias": True}),
}


def _train(config, world_size):
    """Four steps; the last weights of this rank by name."""
    trainer = wire_on_rank(config, world_size)
    trainer.hooks = [hook for hook in trainer.hooks if hook is not trainer.checkpoint]
    trainer.train()
    return {name: p.detach().double().numpy() for c in trainer.step.chunks for name, p in c.module.named_parameters()}


def test_the_figures_are_those_of_the_whole_model_on_any_layout(toy_corpus, tmp_path):
    lines = {}
    for name, (world_size, layout) in LAYOUTS.items():
        changes = {"schedule__steps": 4, "data__valid": [], "model__layers": 2, **layout}
        config = toy_config(toy_corpus, tmp_path, name=name, hooks=[{"name": "parameter_rms", "every": 4}], **changes)
        weights = on_ranks(world_size, _train, config, world_size)[0]
        (found,) = (line for line in read_metrics(config.folder / "metrics.jsonl") if "loss" not in line)
        assert found.pop("step") == 4
        lines[name] = found
        if name == "one":
            fc1 = np.concatenate([w.ravel() for n, w in weights.items() if n.endswith("mlp.linear_fc1.weight")])
            assert found["rms/mlp.linear_fc1.weight"] == pytest.approx(np.sqrt(np.mean(fc1**2)), rel=1e-12)
            assert len(found) == len({n.split("layers.", 1)[-1].lstrip("0123456789.") for n in weights})
    for name in ("tensor", "pipeline"):
        assert lines[name] == pytest.approx(lines["one"], rel=1e-5)
