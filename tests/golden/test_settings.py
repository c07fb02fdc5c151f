"""A record of the first steps of runs that differ from one another in a single setting each.

A setting that is read and then forgotten on its way to the part it is for leaves a run of its own unchanged, and every
comparison of that run with itself too. Here each setting must move the figures away from those of the base run, by
exactly what was recorded. Rewrite `settings.json` only for a deliberate change: `python -m tests.golden.test_settings`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megadiff.run.config import RunConfig
from tests.golden.test_frozen import figures, same
from tests.support.ranks import on_ranks
from tests.support.runs import toy_tree, train_on_rank, write_corpus

FILE = Path(__file__).with_name("settings.json")
BASE: dict[str, Any] = {
    "model": {
        "layers": 3,
        "hidden": 32,
        "heads": 4,
        "seq_length": 16,
        "head_init": 0.02,
        "qk_norm": "full",
        "sink": True,
        "softcap": 1.0,
        "mlp_bias": True,
        "init_scale": 2.0,
        "embed_init": 0.5,
        "vocab_multiple": 8,
    },
    "noise": {},
    "conditioning": {
        "per_token_noise": 0.25,
        "linear_noise": 0.25,
        "prompt": 0.4,
        "infilling": 0.4,
        "pad_insertion": 0.2,
    },
    "batch": {"global_batch_size": 8, "micro_batch_size": 8},
    "optimizer": {"name": "adamw", "lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5},
    "schedule": {"steps": 4, "warmup_steps": 1, "decay_steps": 3},
    "eval": {"every": 0, "sequences": 4, "num_noise_levels": 2},
}
SETTINGS: tuple[str, ...] = (
    "seed=4",
    "model.heads=2",
    "model.ffn_multiple=2",
    "model.mlp_bias=false",
    "model.qk_norm=head",
    "model.qk_norm=none",
    "model.sink=false",
    "model.softcap=null",
    "model.softcap=0.5",
    "model.resid_scale=completep",
    "model.head_scale=completep",
    "model.norm_eps=0.1",
    "model.rope_base=100",
    "model.init_scale=1",
    "model.embed_init=0.25",
    "model.head_init=0.04",
    "noise.shift=masked",
    "noise.shift=uniform",
    "noise.shift=0.5",
    "noise.scale=0.5",
    "noise.min_log_snr=-11",
    "noise.max_log_snr=10",
    "noise.schedule=cosine",
    "noise.schedule=uniform",
    "noise.process=gidd_time noise.p_uniform=0.2",
    "noise.process=gidd_time noise.p_uniform=0.2 noise.gamma=0.5",
    "noise.process=gidd_time noise.p_uniform=0.2 noise.time_eps=0.01",
    "method.name=next_token",
    "objective.weighting=elbo",
    "objective.itakura_saito_weight=0.25",
    "objective.reduction=sum",
    "objective.stratified=false",
    "conditioning.per_token_noise=0.5",
    "conditioning.linear_noise=0.75",
    "conditioning.prompt=0.9",
    "conditioning.infilling=0.9",
    "conditioning.max_fraction=0.5",
    "conditioning.pad_insertion=0.4",
    "conditioning.pad_insertion_law=released",
    "conditioning.prompt_attention=causal",
    "batch.global_batch_size=16",
    "batch.global_batch_size=24 batch.rampup.start=8 batch.rampup.increment=8 batch.rampup.every_steps=1",
    "optimizer.name=laprop",
    "optimizer.lr=0.02",
    "optimizer.beta1=0.5",
    "optimizer.beta2=0.9",
    "optimizer.eps=0.01",
    "optimizer.eps_calibration=sum",
    "optimizer.weight_decay=0.3",
    "optimizer.clip_grad=0.1",
    "optimizer.parametrisation=completep",
    "schedule.warmup_steps=0",
    "schedule.decay_steps=2",
    "schedule.decay_shape=linear",
    "schedule.decay_shape=cosine",
    "schedule.steps=5",
    "eval.sequences=3",
    "eval.num_noise_levels=3",
    "precision.compute=bf16",
)
"""Settings of which each changes the figures; as on the command line. Several that make one change stand together."""

FREE = (
    "batch.micro_batch_size=4",
    "model.vocab_multiple=128",
    "objective.loss_kernel=plain",
    "parallel.recompute=full",
    "parallel.distributed_optimizer=true",
)
"""Settings that change how the figures are computed and none of them."""


def base_tree(folder: Path) -> dict[str, Any]:
    """Write the data and return the base run's description."""
    a, b, c, d = (write_corpus(folder / name, tokens=2000, seed=seed) for seed, name in enumerate("abcd"))
    tree = toy_tree(a, folder / "runs", **BASE)
    tree["data"] = {
        "train": [{"path": str(a), "weight": 2}, {"path": str(b), "weight": 1}],
        "valid": [str(c), str(d)],
        "tokenizer": "byte",
    }
    return tree


def is_evaluated(setting: str) -> bool:
    """Whether a run measures a held-out bound; only those do whose bound says more than their training lines."""
    return setting == "" or setting.startswith(("eval.", "noise.m", "noise.process", "method.name"))


def described(tree: dict[str, Any], setting: str, folder: Path, number: int) -> RunConfig:
    """Return the base run with one setting changed, read as the command reads it."""
    from megadiff.config.load import load_config

    path = folder / "base.yaml"
    path.write_text(json.dumps(tree))
    without = [] if is_evaluated(setting) else ["data.valid=[]"]
    return load_config(path, [f"name=run{number}", *without, *setting.split()], RunConfig)


def _lines_on_rank(configs: list[RunConfig]) -> list[list[dict[str, Any]]]:
    found = []
    for config in configs:
        trained = train_on_rank(config, 1)
        found.append([figures(line) for line in (*trained.lines, *trained.evaluations)])
    return found


COMPARED = ("step", "loss", "elbo", "grad_norm", "lr", "eval_elbo", "eval_elbo_stderr", "eval_log_snr_range")


def observed(folder: Path) -> dict[str, Any]:
    """Return the figures of every run, by its setting; the base run's under an empty name."""
    tree = base_tree(folder)
    settings = ["", *SETTINGS, *FREE]
    configs = [described(tree, setting, folder, number) for number, setting in enumerate(settings)]
    groups = [configs[first : first + 8] for first in range(0, len(configs), 8)]  # process groups pile up in a process
    runs = [run for group in groups for run in on_ranks(1, _lines_on_rank, group)[0]]
    kept = [[{key: line[key] for key in COMPARED if key in line} for line in lines] for lines in runs]
    return dict(zip(settings, kept, strict=True))


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return observed(tmp_path_factory.mktemp("settings"))


RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.mark.parametrize("setting", ["", *SETTINGS, *FREE])
def test_a_setting_gives_the_recorded_figures(now: dict[str, Any], setting: str) -> None:
    wanted = RECORDED[setting]
    if setting == "precision.compute=bf16":  # its last digits depend on the processor
        assert [line.keys() for line in now[setting]] == [line.keys() for line in wanted]
        assert [line["loss"] for line in now[setting][:1]] == pytest.approx([wanted[0]["loss"]], rel=0.02)
        return
    assert same(now[setting], wanted, setting) == []


def differences(now: dict[str, Any], setting: str) -> list[str]:
    """Return what a run has otherwise than the base run, in lines that both have."""
    base = [line for line in now[""] if is_evaluated(setting) or "loss" in line]
    return same(now[setting], base, setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_changes_the_figures(now: dict[str, Any], setting: str) -> None:
    assert differences(now, setting) != []


@pytest.mark.parametrize("setting", FREE)
def test_a_setting_of_the_computation_changes_nothing(now: dict[str, Any], setting: str) -> None:
    assert differences(now, setting) == []


def test_every_recorded_run_is_different() -> None:
    """Two settings that give equal figures would hide a mix-up of the two."""
    lines = [json.dumps(RECORDED[setting]) for setting in ("", *SETTINGS)]
    assert len(set(lines)) == len(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FILE.write_text(json.dumps(observed(Path(name)), indent=None).replace("]], ", "]],\n") + "\n")
