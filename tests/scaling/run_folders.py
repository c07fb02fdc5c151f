"""Run folders with the losses of a planted surface, as a sweep leaves them behind."""

from __future__ import annotations

import json

import numpy as np
import yaml

from megadiff.scaling.run_curves import flops_per_token_of
from tests.scaling.planted import MASKED

FLOPS_A_STEP = 8e11
SHAPES = [(2, 64), (3, 64), (3, 96), (4, 96), (4, 128), (5, 128), (6, 160)]


def write_run(folder, layers, hidden, *, luck=1.0, steps=2000, change=None, lines=None, surface=MASKED, **settings):
    """A run folder on the planted surface, evaluated every 20 steps, with a cooldown of 40 steps at the end."""
    folder.mkdir(parents=True)
    config = {
        "name": folder.name, "seed": 0, "noise": {"shift": "masked"},
        "model": {"layers": layers, "hidden": hidden, "heads": 2, "seq_length": 64, "ffn_multiple": 4},
        "method": {"name": "gidd"}, "batch": {"global_batch_size": 32},
        "optimizer": {"lr": 0.1, "clip_grad": 1.0}, "schedule": {"steps": steps, "warmup_steps": 10},
    }  # fmt: skip
    for key, value in settings.items():
        section, _, name = key.partition("__")
        config[section] = {**config[section], name: value} if name else value
    size = flops_per_token_of({f"model.{key}": value for key, value in config["model"].items()}, "deepseek")
    written = []
    for step in range(20, (lines or steps) + 1, 20):
        tokens = step * FLOPS_A_STEP / size
        loss = float(surface(np.float64(size), np.float64(tokens))) * luck
        rate = 0.1 if step <= steps - 40 else 0.05
        written += [{"step": step, "tokens": tokens, "loss": loss, "lr": rate}]
        written += [{"step": step, "eval_elbo": loss, "eval_elbo_stderr": 0.01}]
    written = [change(line) if change else line for line in written]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in written))
    (folder / "data.json").write_text(json.dumps({"fingerprint": settings.get("data_is", "a" * 64)}))
    return folder


def clean_sweep(folder):
    rng = np.random.default_rng(0)
    return [
        write_run(folder / f"{layers}x{hidden}", layers, hidden, luck=float(np.exp(0.001 * rng.standard_normal())))
        for layers, hidden in SHAPES
    ]
