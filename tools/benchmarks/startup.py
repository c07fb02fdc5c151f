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
from processor import processor

from megadiff.config.command_line import CommandParser
from megadiff.errors import run_command

_EPILOG = """example:
  OMP_NUM_THREADS=1 python tools/benchmarks/startup.py --repeats 7 --before ../megadiff-before

The commands take turns, each in a process of its own; user and system time of that process, medians. "wrong value"
and "misspelt key" are `--check` of descriptions with these mistakes (suggestions look into every member of every
family), "check" that of one that could start, "one step" a whole run of one step of a toy model, with its evaluation
and its checkpoint. The last rows export that run, import the folder, and sample and evaluate the run; "no model" is a
folder that does not exist. --before runs the same commands from another checkout as well, in turns with these.
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
    parser.add_argument("--before", type=Path, help="checkout of another version to compare with")
    arguments = parser.parse_args()

    sides = {"now": Path(__file__).resolve().parents[2]}
    if arguments.before:
        sides["before"] = arguments.before.resolve()
    with tempfile.TemporaryDirectory() as folder:
        commands = _commands(Path(folder))
        found = {(name, side): list[float]() for name in commands for side in sides}
        for repeat in range(arguments.repeats + 1):
            for name, side in found:
                seconds = _cpu_seconds(commands[name], sides[side])
                if repeat:  # the first process of each kind warms the disk's cache
                    found[name, side].append(seconds)
    print(f"machine            {processor()}, {os.cpu_count()} cores, Python {host.python_version()}")
    heads = "".join(f"{side:>9}" for side in sides) + "    ratio" * (len(sides) - 1)
    print(f"CPU s, median of {arguments.repeats:<5}{heads}")
    for name in commands:
        now, *before = (statistics.median(found[name, side]) for side in sides)
        print(f"{name:<22}{now:>9.2f}" + "".join(f"{other:>9.2f}{now / other:>9.2f}" for other in before))


def describe_toy_run(folder: Path) -> dict[str, Any]:
    """Make data in the folder, and return the description of a run of one step on them."""
    text = folder / "text.jsonl"
    text.write_text("".join(f'{{"text": "line {i} of some text to read"}}\n' for i in range(200)))
    data = str(folder / "text")
    preprocess = ["preprocess_data", "--input", str(text), "--tokenizer", "byte", "--output-prefix", data]
    subprocess.run([sys.executable, "-m", "megadiff", *preprocess], check=True, capture_output=True)
    files = {"train": [data], "valid": [data], "tokenizer": "byte"}
    return {**_RUN, "data": files, "output_dir": str(folder / "runs")}


def _commands(folder: Path) -> dict[str, str]:
    """Return shell commands by name; those after "one step" use its run, and each replaces what it wrote before."""
    tree = describe_toy_run(folder)
    good, misspelt, wrong = (folder / f"{name}.yaml" for name in ("good", "misspelt", "wrong"))
    good.write_text(yaml.safe_dump(tree))
    misspelt.write_text(yaml.safe_dump({**tree, "optimiser": {}}))
    wrong.write_text(yaml.safe_dump({**tree, "seed": "three"}))
    megadiff = f"exec {sys.executable} -m megadiff"
    run, exported, back = folder / "runs/startup", folder / "exported", folder / "back"
    return {
        "import torch": f"exec {sys.executable} -c 'import torch'",
        "help": f"{megadiff} train --help",
        "wrong value": f"{megadiff} train --config {wrong} --check",
        "misspelt key": f"{megadiff} train --config {misspelt} --check",
        "no model": f"{megadiff} generate --model {folder}/none",
        "check": f"{megadiff} train --config {good} --check",
        "one step": f"rm -rf {run}; {megadiff} train --config {good}",
        "export": f"rm -rf {exported}; {megadiff} convert_checkpoint export --checkpoint {run} --output {exported}",
        "import": f"rm -rf {back}; {megadiff} convert_checkpoint import --input {exported} --output {back}",
        "generate": f"{megadiff} generate --model {run} --steps 4",
        "evaluate": f"{megadiff} evaluate elbo --model {run} --data {folder}/text --sequences 4",
    }


def _cpu_seconds(command: str, checkout: Path) -> float:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    ended = subprocess.run(["/bin/sh", "-c", command], capture_output=True, env=environment, cwd=checkout)
    if ended.returncode not in (0, 2):
        raise SystemExit(f"{command} failed: {ended.stderr.decode(errors='replace')}")
    return spent() - before


if __name__ == "__main__":
    run_command(main)
