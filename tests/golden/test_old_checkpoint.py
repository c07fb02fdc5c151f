"""A checkpoint written by an earlier version and kept here: later versions resume, export and open it.

`old_run/` is a run folder of 3 layers after 3 of 5 steps; `old_run.json` holds the metrics of the two steps that
followed and sums of the exported weights. Rewrite them only when the manifest's format rises:
`python -m tests.golden.test_old_checkpoint`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from megadiff.config.load import load_config
from megadiff.run.config import RunConfig
from tests.golden.test_frozen import figures, same
from tests.support.forked_command import Ended, call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import toy_tree, train_all, write_corpus

OLD = Path(__file__).with_name("old_run")
AFTER = Path(__file__).with_name("old_run.json")
SAVED_STEP = 3


def call(folder: Path, *command: str | Path) -> Ended:
    """Run a command inside `folder`, so that no path of this machine enters a checkpoint."""
    return call_forked(*command, before=lambda: os.chdir(folder))


def write_inputs(folder: Path) -> None:
    """Write the run's data and description."""
    (folder / "data").mkdir()
    write_corpus(folder / "data/toy", tokens=3000)
    tree = toy_tree(
        Path("data/toy"),
        Path("runs"),
        model__layers=3,
        model__hidden=16,
        model__vocab_multiple=4,
        schedule__steps=5,
        checkpoint__every=SAVED_STEP,
        checkpoint__keep=0,
    )
    (folder / "toy.yaml").write_text(yaml.safe_dump(tree))


def trained(folder: Path) -> dict[str, Any]:
    """Run to the end, export, and return the metrics after the saved step and the sums of the exported weights."""
    ended = call(folder, "pretrain_dlm.py", "--config", "toy.yaml")
    assert ended.code == 0, ended.out + ended.err
    lines = [json.loads(line) for line in (folder / "runs/toy/metrics.jsonl").read_text().splitlines()]
    ended = call(
        folder, "tools/convert_checkpoint.py", "export", "--checkpoint", f"runs/toy/checkpoints/step_{SAVED_STEP:08d}",
        "--output", "exported",
    )  # fmt: skip
    assert ended.code == 0, ended.out + ended.err
    weights = load_file(folder / "exported/model.safetensors")
    return {
        "metrics": [figures(line) for line in lines if line["step"] > SAVED_STEP],
        "weights": {name: [float(w.double().sum()), float(w.double().norm())] for name, w in sorted(weights.items())},
    }


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("old")
    write_inputs(folder)
    shutil.copytree(OLD, folder / "runs/toy")
    found = trained(folder)
    last = folder / "runs/toy/checkpoints/step_00000005/manifest.json"
    found["health"] = json.loads(last.read_text())["health"]
    assert f"step_{SAVED_STEP:08d} after step {SAVED_STEP} of 5" in (folder / "runs/toy/log.txt").read_text()
    return found


CHANGES = (
    "optimizer.eps=0.01",
    "optimizer.beta1=0.5",
    "optimizer.beta2=0.5",
    "optimizer.weight_decay=30",
    "optimizer.lr=0.02",
    "optimizer.clip_grad=0.001",
    "schedule.steps=6",
    "parallel.distributed_optimizer=true",
    "parallel.distributed_optimizer=true optimizer.eps=0.01",
    "parallel.distributed_optimizer=true optimizer.beta1=0.5",
    "parallel.distributed_optimizer=true optimizer.weight_decay=30",
)
"""Settings that may differ where a run goes on, each alone or with the sharded optimizer."""


def changed(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the metrics of the steps that follow under each change; an empty name stands for no change."""
    configs = []
    for number, change in enumerate(("", *CHANGES)):
        shutil.copytree(OLD, folder / f"runs/changed{number}")
        places = ("name=changed" + str(number), f"output_dir={folder}/runs", f"data.train=[{folder}/data/toy]")
        configs.append(load_config(folder / "toy.yaml", [*places, "data.valid=[]", *change.split()], RunConfig))
    (runs,) = on_ranks(1, train_all, configs, 1)
    kept = [
        [{key: line[key] for key in ("step", "loss", "elbo", "grad_norm", "lr")} for line in run.lines] for run in runs
    ]
    return {
        change: [line for line in lines if line["step"] > SAVED_STEP]
        for change, lines in zip(("", *CHANGES), kept, strict=True)
    }


@pytest.fixture(scope="module")
def now_changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("changed")
    write_inputs(folder)
    return changed(folder)


RECORDED: dict[str, Any] = json.loads(AFTER.read_text()) if AFTER.exists() else {}


def test_an_old_checkpoint_resumes_to_the_recorded_metrics(resumed: dict[str, Any]) -> None:
    for found, wanted in zip(resumed["metrics"], RECORDED["metrics"], strict=True):
        shared = {key: found.get(key) for key in wanted}  # keys that came later are no concern of this file
        assert same(shared, wanted, f"step {wanted['step']}") == []


def test_a_resumed_run_remembers_what_its_health_was_judged_by(resumed: dict[str, Any]) -> None:
    """Losses and gradient norms of the steps before the resume and after it, as in the metrics."""
    lines = [line for line in map(json.loads, (OLD / "metrics.jsonl").read_text().splitlines()) if "loss" in line]
    lines += [line for line in resumed["metrics"] if "loss" in line]
    assert len(lines) == 5
    for key in ("loss", "grad_norm"):
        assert resumed["health"][key] == pytest.approx([line[key] for line in lines], rel=2e-5)


def test_an_old_checkpoint_exports_the_recorded_weights(resumed: dict[str, Any]) -> None:
    assert same(resumed["weights"], RECORDED["weights"], "weights") == []


@pytest.mark.parametrize("change", ["", *CHANGES])
def test_an_old_checkpoint_resumes_under_changed_settings(now_changed: dict[str, Any], change: str) -> None:
    assert same(now_changed[change], RECORDED["changed"][change], change) == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_counts_from_the_resume_on(now_changed: dict[str, Any], change: str) -> None:
    """The old values lie in the checkpoint's parameter groups and must not come back with them."""
    settings = " ".join(word for word in change.split() if not word.startswith("parallel."))
    assert same(now_changed[change], now_changed[settings or ""], change) == []
    assert (same(now_changed[change], now_changed[""], change) == []) == (not settings)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        write_inputs(made)
        found = trained(made)
        run = made / "runs/toy"
        shutil.rmtree(OLD, ignore_errors=True)
        step = f"checkpoints/step_{SAVED_STEP:08d}"
        shutil.copytree(run / step, OLD / step)
        (OLD / "LATEST").write_text(f"step_{SAVED_STEP:08d}\n")
        kept = [
            line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= SAVED_STEP
        ]
        (OLD / "metrics.jsonl").write_text("\n".join(kept) + "\n")
        AFTER.write_text(json.dumps({**found, "changed": changed(made)}, indent=1, sort_keys=True) + "\n")
