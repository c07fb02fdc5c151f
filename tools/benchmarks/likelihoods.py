"""CPU time of likelihoods, as a multiple of the time of their forward passes: texts, and multiple-choice requests."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from exported_model import Timed, timed_model
from processor import with_torch
from startup import describe_toy_run

from megadiff.config.command_line import CommandParser
from megadiff.diffusion.config import PROCESSES, NoiseConfig
from megadiff.diffusion.noise_process import build_process
from megadiff.diffusion.processes.gidd_snr import SHIFTS
from megadiff.errors import run_command
from megadiff.eval.likelihood import BoundSettings, Item, bounds

_EPILOG = """example:
  OMP_NUM_THREADS=1 python tools/benchmarks/likelihoods.py --runs 5

Texts: `counts`, the default estimator, of random tokens by the exported model with random weights. Requests: those of
an lm-evaluation-harness task with four choices (one context, four continuations of several tokens), answered by
`HarnessModel` with a model trained for one step, tokenizing and batching included; without the search for greedy
completions, which samples. Times are CPU seconds of the process.
"""


def main() -> None:
    """Measure and print both tables."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[260, 32768, 131072])
    parser.add_argument("--noises", nargs="+", choices=SHIFTS, default=["masked", "balanced", "uniform"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--texts", type=int, default=2, help="texts (default 2)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text (default 64)")
    parser.add_argument("--draws", type=int, default=32, help="noised copies of each text (default 32)")
    parser.add_argument("--requests", type=int, default=200, help="multiple-choice requests (default 200; 0 for none)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind (default 5)")
    arguments = parser.parse_args()
    print(f"machine   {with_torch()}")
    print(
        f"texts     {arguments.layers} blocks of {arguments.hidden}; {arguments.texts} of {arguments.length} tokens, "
        f"{arguments.draws} draws; median of {arguments.runs}"
    )
    print("vocabulary  noise      forwards s   all / forwards")
    for vocab_size in arguments.vocab_sizes:
        for noise in arguments.noises:
            print(f"{vocab_size:>10}  {noise:<9} {_figures(_texts(arguments, vocab_size, noise))}", flush=True)
    if arguments.requests:
        print(f"requests  {arguments.requests} of four choices, bytes, balanced noise, {arguments.draws} draws")
        print(f"       260  balanced  {_figures(_requests(arguments))}")


def _measure(model: Timed, work: Callable[[], object], runs: int) -> list[tuple[float, float]]:
    """Return the seconds of forwards and of everything in each run, after one that is not counted."""
    found = []
    for _ in range(runs + 1):
        model.taken, began = 0.0, time.process_time()
        work()
        found.append((model.taken, time.process_time() - began))
    return found[1:]


def _figures(found: list[tuple[float, float]]) -> str:
    forwards = statistics.median(forwards for forwards, _ in found)
    return f"{forwards:>11.2f} {statistics.median(whole / forwards for forwards, whole in found):>16.2f}"


def _texts(arguments: argparse.Namespace, vocab_size: int, noise: str) -> list[tuple[float, float]]:
    model = timed_model(
        vocab_size=vocab_size, layers=arguments.layers, hidden=arguments.hidden, length=arguments.length
    )
    draw = np.random.default_rng(0)
    texts = draw.integers(0, vocab_size - 1, size=(arguments.texts, arguments.length))
    items = [Item((), tuple(map(int, text))) for text in texts]
    process = build_process(PROCESSES.build(NoiseConfig, shift=noise), vocab_size=vocab_size, mask_id=vocab_size - 1)
    settings = BoundSettings(draws=arguments.draws)

    @torch.no_grad()
    def evaluate() -> None:
        bounds(items, model, process=process, settings=settings)

    return _measure(model, evaluate, arguments.runs)


def _requests(arguments: argparse.Namespace) -> list[tuple[float, float]]:
    from megadiff.eval.harness import HarnessModel, HarnessSettings
    from megadiff.run.load_model import load_model

    size = {"layers": arguments.layers, "hidden": arguments.hidden, "heads": 4, "seq_length": 128}
    with tempfile.TemporaryDirectory() as folder:
        tree = {**describe_toy_run(Path(folder)), "model": size, "noise": {"shift": "balanced"}}
        description = Path(folder, "run.yaml")
        description.write_text(yaml.safe_dump(tree))
        train = [sys.executable, "-m", "megadiff", "train", "--config", str(description)]
        subprocess.run(train, check=True, capture_output=True)
        with load_model(Path(tree["output_dir"], tree["name"])) as opened:
            timed = Timed(opened.chunks[0])
            settings = HarnessSettings(bound=BoundSettings(draws=arguments.draws), check_greedy=False)
            model = replace(opened, chunks=[timed])  # type: ignore[list-item]

            def answer() -> None:
                harness = HarnessModel(model, settings, say=lambda _: None)
                harness.loglikelihood(_questions(arguments.requests), disable_tqdm=True)

            return _measure(timed, answer, arguments.runs)


def _questions(count: int) -> list[SimpleNamespace]:
    """Return requests as the harness gives them: contexts of 60 to 80 letters, four continuations of 4 to 20."""
    draw = np.random.default_rng(0)

    def words(low: int, high: int) -> str:
        return "".join(chr(97 + letter) for letter in draw.integers(0, 26, size=draw.integers(low, high + 1)))

    found: list[SimpleNamespace] = []
    while len(found) < count:
        context = words(60, 80)
        for choice in range(min(4, count - len(found))):
            arguments = (context, f" {words(4, 20)}")
            found.append(SimpleNamespace(args=arguments, task_name="made up", doc_id=len(found) // 4, idx=choice))
    return found


if __name__ == "__main__":
    run_command(main)
