"""Comparison of FP8 with bf16 training: the same steps on the same real text, and held-out ELBOs with their errors."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_environment import add_platform, device_of

from megadiff.config.command_line import CommandParser
from megadiff.errors import MegadiffError, run_command
from megadiff.metric_lines import read_metrics

_ROOT = Path(__file__).resolve().parents[2]
_EPILOG = """example:
  python tools/benchmarks/gpu_fp8_quality.py --output results

The text is Python's own documentation, as bytes. `pretrain_dlm.py` trains 12 layers of width 768 for 200 steps of 64
sequences of 512 tokens, once in bf16 and once for each FP8 recipe. Sequences, noise, first weights and held-out noise
are the same. Two runs agree if their bounds differ by less than two standard errors of a bound. Data and runs are
deleted. Without Transformer Engine there is nothing to compare, which is reported and is no failure.
"""


def main() -> None:
    """Make the data, train the models, and compare their bounds."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--recipes", nargs="+", default=["tensorwise"], help="values of precision.fp8 (default tensorwise)"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--part", default="", metavar="FOLDER", help="read this folder of the library alone: asyncio")
    add_platform(parser)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for fp8_quality.json (default: here)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    arguments = parser.parse_args()
    if device_of(arguments) == "cuda" and find_spec("transformer_engine") is None:
        print("held-out ELBOs in FP8 are left out: Transformer Engine cannot be imported")
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = _compared(Path(folder), arguments)
    if lost := [recipe for recipe, one in found.items() if "failed" in one]:
        raise MegadiffError(f"no figure for {', '.join(lost)}; the lines above give the reasons")


def _compared(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    _run("tools/demo_corpus.py", "--output", folder / "corpus", "--part", arguments.part)
    for split in ("train", "valid"):
        _run(
            "tools/preprocess_data.py", "--input", folder / f"corpus/{split}.jsonl", "--output-prefix", folder / split,
            "--tokenizer", "byte", "--append-eod", "--overwrite",
        )  # fmt: skip
    found: dict[str, Any] = {}
    for recipe in ("none", *(arguments.recipes if arguments.platform == "cuda" else ())):
        try:
            found[recipe] = _trained(recipe, folder, arguments)
        except MegadiffError as error:
            found[recipe] = {"failed": str(error)}
        print(_line(recipe, found), flush=True)
        (arguments.output / "fp8_quality.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _trained(recipe: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    name = f"fp8-{recipe}"
    tree = {
        "name": name,
        "output_dir": str(folder),
        "platform": arguments.platform,
        "model": {"layers": 12, "hidden": 768, "heads": 6, "seq_length": 512, "qk_norm": "head", "vocab_multiple": 64},
        "noise": {"shift": "balanced"},
        "data": {"train": [str(folder / "train")], "valid": [str(folder / "valid")], "tokenizer": "byte"},
        "batch": {"global_batch_size": 64, "micro_batch_size": 32},
        "precision": {"compute": "bf16", **({} if recipe == "none" else {"fp8": recipe})},
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1},
        "schedule": {"steps": arguments.steps, "warmup_steps": arguments.steps // 10, "decay_steps": 0.3},
        "checkpoint": {"every": 100_000},
        "eval": {"every": arguments.steps, "sequences": 128, "num_noise_levels": 8},
        "log": {"every": 20, "tensorboard": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    _run("pretrain_dlm.py", "--config", path, *arguments.overrides)
    lines = read_metrics(folder / name / "metrics.jsonl")
    last = [line for line in lines if line.get("eval_elbo") is not None][-1]
    return {"elbo": last["eval_elbo"], "stderr": last["eval_elbo_stderr"], "step": last["step"]}


def _line(recipe: str, found: dict[str, Any]) -> str:
    one, base = found[recipe], found["none"]
    if "failed" in one:
        return f"{recipe:12} FAILED: {one['failed']}"
    line = f"{recipe:12} held-out ELBO {one['elbo']:.4f} +- {one['stderr']:.4f} after {one['step']} steps"
    if recipe == "none" or "failed" in base:
        return line
    error = math.hypot(one["stderr"], base["stderr"]) / math.sqrt(2)
    apart = (one["elbo"] - base["elbo"]) / error
    return f"{line}; {apart:+.2f} standard errors from bf16: {'agrees' if abs(apart) < 2 else 'DIFFERS'}"


def _run(tool: str, *arguments: object) -> None:
    command = [sys.executable, tool, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = (ended.stderr or ended.stdout).strip().splitlines()
        raise MegadiffError(f"{tool} ended with {ended.returncode}: {lines[-1] if lines else 'no message'}")


if __name__ == "__main__":
    run_command(main)
