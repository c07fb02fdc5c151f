"""CPU time of generating text, as a multiple of the time of its forward passes, by size of the vocabulary."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from exported_model import timed_model
from processor import with_torch

from megadiff.config.command_line import CommandParser
from megadiff.diffusion.processes.gidd_snr import SHIFTS
from megadiff.errors import run_command
from megadiff.sampling import standalone
from megadiff.sampling.standalone import HybridNoise, Settings, generate

_EPILOG = """example:
  OMP_NUM_THREADS=1 python tools/benchmarks/sampling.py --runs 3

The model is the one in exported folders, with random weights; it is called in every step. "whole" makes the
probabilities of the whole vocabulary at every position and step, as `predict` does. Runs of both kinds alternate, and
their tokens must be equal each time. Times are CPU seconds of the process, forwards those of one run's passes.
"""


def main() -> None:
    """Measure every noise with every vocabulary, and print the table."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--vocab-sizes", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--noises", nargs="+", choices=SHIFTS, default=["masked", "balanced", "uniform"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=8, help="sequences of a batch (default 8)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (default 64)")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps (default 16)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind (default 5)")
    arguments = parser.parse_args()
    print(f"machine   {with_torch()}")
    print(
        f"model     {arguments.layers} blocks of {arguments.hidden}; {arguments.sequences} sequences of "
        f"{arguments.length}, {arguments.steps} steps; median of {arguments.runs}"
    )
    print("vocabulary  noise      forwards s   whole / forwards   now / forwards")
    for vocab_size in arguments.vocab_sizes:
        for noise in arguments.noises:
            forwards, whole, now = _measure(arguments, vocab_size, noise)
            print(f"{vocab_size:>10}  {noise:<9} {forwards:>11.2f} {whole:>18.2f} {now:>16.2f}", flush=True)


def _measure(arguments: argparse.Namespace, vocab_size: int, noise: str) -> tuple[float, float, float]:
    """Return the median seconds of forwards, and the median ratios of a run to its forwards, whole and now."""
    model = timed_model(
        vocab_size=vocab_size, layers=arguments.layers, hidden=arguments.hidden, length=arguments.length
    )
    process = HybridNoise(vocab_size, vocab_size - 1, SHIFTS[noise])
    settings = Settings(arguments.length, max_denoising_steps=arguments.steps, reuse_logits=False)
    prompt = torch.empty(arguments.sequences, 0, dtype=torch.int64)
    ratios: dict[bool, list[float]] = {True: [], False: []}
    forwards: list[float] = []
    for number in range(arguments.runs):
        texts = {}
        for is_whole in (True, False):
            model.taken, began = 0.0, time.process_time()
            with _whole_vocabulary(is_whole):
                texts[is_whole] = generate(model, prompt, settings, process, seed=number).sequences
            ratios[is_whole].append((time.process_time() - began) / model.taken)
            forwards.append(model.taken)
        assert torch.equal(texts[True], texts[False]), "a token differs"
    return statistics.median(forwards), statistics.median(ratios[True]), statistics.median(ratios[False])


@contextmanager
def _whole_vocabulary(is_whole: bool) -> Iterator[None]:
    """Make the sampler's predictions all at once."""
    lazy = standalone.LazyPrediction
    if is_whole:
        standalone.LazyPrediction = standalone.predict  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        standalone.LazyPrediction = lazy


if __name__ == "__main__":
    run_command(main)
