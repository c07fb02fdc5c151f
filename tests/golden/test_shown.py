"""A record of what a run shows beside its metrics, and of what its checkpoint and its export say of it.

One run whose log speaks at every third step, on documents that begin with bos: curves in TensorBoard, texts it drew,
lines of the console, facts in its manifest. Rewrite `shown.json` only for a deliberate change:
`python -m tests.golden.test_shown`.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.golden.test_frozen import SMALL, same
from tests.support.forked_command import call_forked

FILE = Path(__file__).with_name("shown.json")
STEPS = 7


def write_data(folder: Path) -> None:
    """Two sources whose documents begin with bos and end with eos, by the command."""
    for source, step in (("a", 5), ("b", 9)):
        texts = ["".join(chr(97 + (i * step + j * j) % 20) for j in range(10 + i % 40)) for i in range(80)]
        (folder / f"{source}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        ended = call_forked(
            *("tools/preprocess_data.py", "--input", folder / f"{source}.jsonl", "--output-prefix", folder / source),
            *("--tokenizer", "byte", "--append-eod", "--prepend-bos"),
        )
        assert ended.code == 0, ended.err


def run_of(folder: Path) -> Path:
    """Train by the command; the run folder."""
    write_data(folder)
    tree = {
        "name": "shown",
        "output_dir": str(folder),
        "platform": "cpu",
        "seed": 6,
        "model": {**SMALL, "seq_length": 24},
        "noise": {"shift": "high_uniform", "min_log_snr": -2, "max_log_snr": 12},
        "precision": {"compute": "fp32"},
        "data": {"train": [str(folder / "a"), str(folder / "b")], "valid": [str(folder / "b")], "tokenizer": "byte"},
        "batch": {
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "rampup": {"start": 4, "increment": 4, "every_steps": 2},
        },
        "optimizer": {"name": "adamw", "lr": 0.01},
        "schedule": {"steps": STEPS, "warmup_steps": 1, "decay_steps": 3},
        "checkpoint": {"every": 2, "keep": 2, "async": False},
        "eval": {"every": 4, "sequences": 4, "num_noise_levels": 2, "samples": 2, "sample_steps": 5},
        "log": {"every": 3},
    }
    (folder / "shown.yaml").write_text(yaml.safe_dump(tree))
    ended = call_forked("pretrain_dlm.py", "--config", folder / "shown.yaml")
    assert ended.code == 0, ended.out + ended.err
    return folder / "shown"


CLOCKED = re.compile(r"_s$|_seconds$|tflops|mfu|hfu|peak_bytes|goodput")
"""Curves whose values depend on the machine."""


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """Return TensorBoard's curves, points of what a clock measured without their value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder)).Reload()
    found = {tag: [[e.step, e.value] for e in reader.Scalars(tag)] for tag in sorted(reader.Tags()["scalars"])}
    return {tag: [point[:1] if CLOCKED.search(tag) else point for point in points] for tag, points in found.items()}


def steps_said(run: Path) -> list[str]:
    """Return the console's lines of steps without what a clock measured."""
    lines = [line for line in (run / "log.txt").read_text().splitlines() if " step " in line]
    lines = [line[line.index("step ") :].replace(str(run), "RUN") for line in lines]
    kept = [re.sub(r"\|[^|]*tokens/s.*| in [\d.]+ s, training paused.*", "", line) for line in lines]
    return [re.sub(r"(\.\d{3})\d+", r"\1", line) for line in kept]


def flops_per_token(run: Path) -> list[list[float]]:
    """Return model and executed FLOPs of a token in each training line, in which the clock's figures cancel."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("tflops_per_device", "executed_tflops_per_device")
    return [[line[key] * 1e12 / line["tokens_per_s"] for key in keys] for line in lines if "loss" in line]


def told_by_tools(run: Path, folder: Path) -> dict[str, Any]:
    """Return what the commands that open a trained model make of this one."""
    pairs = [{"prompt": "abc", "completion": "def"}, {"prompt": "", "completion": "zyxw"}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    output = folder / "out.json"
    found = {}
    for name, options in {
        "elbo": ("elbo", "--data", folder / "b", "--sequences", "4", "--noise-levels", "2"),
        "counts": ("likelihood", "--data", folder / "pairs.jsonl", "--draws", "8"),
        "levels": ("likelihood", "--data", folder / "pairs.jsonl", "--draws", "8", "--estimator", "levels"),
    }.items():
        ended = call_forked("tools/evaluate.py", *options, "--model", run, "--output", output)
        assert ended.code == 0, ended.err
        found[name] = {key: value for key, value in json.loads(output.read_text()).items() if key not in WORDS}
    for sampler in ("ancestral", "adaptive"):
        drawn = ("--prompt", "abc", "--num-tokens", "12", "--steps", "6", "--sampler", sampler, "--temperature", "0.7")
        ended = call_forked("tools/generate.py", "--model", run, *drawn, "--top-k", "40", "--top-p", "0.9")
        assert ended.code == 0, ended.err
        found[sampler] = ended.out
    return found


WORDS = ("model", "summary", "data")
"""Keys of an evaluation that hold paths or text for a person."""


def observed(folder: Path) -> dict[str, Any]:
    """Return every record."""
    run = run_of(folder)
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    manifest = json.loads((run / "checkpoints" / checkpoints[-1] / "manifest.json").read_text())
    ended = call_forked("tools/convert_checkpoint.py", "export", "--checkpoint", run, "--output", folder / "hf")
    assert ended.code == 0, ended.err
    ended = call_forked("tools/convert_checkpoint.py", "import", "--input", folder / "hf", "--output", folder / "back")
    assert ended.code == 0, ended.err
    imported = json.loads(next((folder / "back").rglob("manifest.json")).read_text())
    training = json.loads((folder / "hf/training.json").read_text())
    for varying in ("versions", "config"):
        del training[varying]
    for source in training["mixture"]["sources"]:
        source["path"] = Path(source["path"]).name
    facts = ("step", "samples", "tokens", "vocab_size", "mask_id", "prepended_bos", "has_optimizer", "layout", "health")
    return {
        "checkpoints": checkpoints,
        "console": steps_said(run),
        "curves": curves(run / "tensorboard"),
        "flops_per_token": flops_per_token(run),
        "imported": {key: imported.get(key) for key in facts},
        "manifest": {key: manifest.get(key) for key in facts},
        "samples": {path.name: path.read_text() for path in sorted((run / "samples").iterdir())},
        "tools": told_by_tools(run, folder),
        "training.json": training,
        "training_keys": sorted(json.loads((folder / "hf/training.json").read_text())["config"]),
    }


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return observed(tmp_path_factory.mktemp("shown"))


RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.mark.parametrize("part", sorted(RECORDED))
def test_a_run_shows_what_was_recorded(now: dict[str, Any], part: str) -> None:
    assert same(now[part], RECORDED[part], part) == []


def test_the_command_measures_what_the_run_did_last(now: dict[str, Any]) -> None:
    assert now["tools"]["elbo"]["eval_elbo"] == pytest.approx(now["curves"]["eval/elbo"][-1][1], rel=1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FILE.write_text(json.dumps(observed(Path(name)), indent=1, sort_keys=True) + "\n")
