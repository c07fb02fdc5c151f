"""CPU seconds that a command takes before it does its work, beside the import of torch alone."""

from __future__ import annotations

import os
import platform as host
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from megadiff.config.command_line import CommandParser
from megadiff.errors import run_command

_EPILOG = """example:
  OMP_NUM_THREADS=1 python tools/benchmarks/startup.py --repeats 7

The commands take turns, each in a process of its own; user and system time of that process, medians. "wrong value"
and "misspelt key" are `--check` of descriptions with these mistakes (suggestions look into every member of every
family), "check" that of one that could start, "one step" a whole run of one step of a toy model, with its evaluation
and its checkpoint.
"""

_RUN = {
    "name": "startup",
    "platform": "cpu",
    "model": {"layers": 2, "hidden": 32, "heads": 2, "seq_length": 32},
    "batch": {"global_batch_size": 4, "micro_batch_size": 4},
    "precision": {"compute": "fp32"},
    "optimizer": {"lr": 1e-3},
    "schedule": {"steps": 1, "warmup_steps": 0},
}


def main() -> None:
    """Print the table."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind (default 5)")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(Path(folder))
        found: dict[str, list[float]] = {name: [] for name in commands}
        for repeat in range(arguments.repeats + 1):
            for name, command in commands.items():
                seconds = _cpu_seconds(command)
                if repeat:  # the first process of each kind warms the disk's cache
                    found[name].append(seconds)
    print(f"machine            {host.machine()}, {os.cpu_count()} cores, Python {host.python_version()}")
    for name, seconds in found.items():
        print(f"{name:<18} {statistics.median(seconds):.2f} CPU s (median of {len(seconds)})")


def describe_toy_run(folder: Path) -> dict[str, Any]:
    """Make data in the folder, and return the description of a run of one step on them."""
    text = folder / "text.jsonl"
    text.write_text("".join(f'{{"text": "line {i} of some text to read"}}\n' for i in range(200)))
    data = str(folder / "text")
    preprocess = ["preprocess_data", "--input", str(text), "--tokenizer", "byte", "--output-prefix", data]
    subprocess.run([sys.executable, "-m", "megadiff", *preprocess], check=True, capture_output=True)
    files = {"train": [data], "valid": [data], "tokenizer": "byte"}
    return {**_RUN, "data": files, "output_dir": str(folder / "runs")}


def _commands(folder: Path) -> dict[str, list[str]]:
    tree = describe_toy_run(folder)
    good, misspelt, wrong = (folder / f"{name}.yaml" for name in ("good", "misspelt", "wrong"))
    good.write_text(yaml.safe_dump(tree))
    misspelt.write_text(yaml.safe_dump({**tree, "optimiser": {}}))
    wrong.write_text(yaml.safe_dump({**tree, "seed": "three"}))
    train = [sys.executable, "-m", "megadiff", "train", "--config"]
    return {
        "import torch": [sys.executable, "-c", "import torch"],
        "help": [sys.executable, "-m", "megadiff", "train", "--help"],
        "wrong value": [*train, str(wrong), "--check"],
        "misspelt key": [*train, str(misspelt), "--check"],
        "check": [*train, str(good), "--check"],
        "one step": ["/bin/sh", "-c", f"rm -rf {folder}/runs; exec {' '.join([*train, str(good)])}"],
    }


def _cpu_seconds(command: list[str]) -> float:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode not in (0, 2):
        raise SystemExit(f"{' '.join(command)} failed: {ended.stderr}")
    return spent() - before


if __name__ == "__main__":
    run_command(main)
