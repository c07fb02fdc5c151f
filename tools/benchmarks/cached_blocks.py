"""Time to generate text block by block, with and without a cache of the keys and values of finished blocks."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from exported_model import exported_model
from processor import with_torch
from torch import Tensor

from megadiff.config.command_line import CommandParser
from megadiff.errors import run_command

_EPILOG = """example:
  OMP_NUM_THREADS=1 python tools/benchmarks/cached_blocks.py --runs 5

The model is the one in exported folders, with random weights. It is called in every ancestral step, under uniform
noise. Runs with and without the cache alternate, and their tokens must be equal each time. "causal" and "block" are
the two attention masks of a prompt in training: with "block" the whole prefix is encoded again for each block.
"""


def main() -> None:
    """Measure both kinds of prefix and print the table."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default 64)")
    parser.add_argument("--block-length", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of a block (default 8)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind (default 3)")
    arguments = parser.parse_args()
    print(f"machine   {with_torch()}")
    print(
        f"model     {arguments.layers} blocks of {arguments.hidden}, vocabulary {arguments.vocab_size}; prompt "
        f"{arguments.prompt}, {arguments.blocks} blocks of {arguments.block_length}, {arguments.steps} steps each; "
        f"median of {arguments.runs}"
    )
    print("prefix    tail    uncached s   cached s   ratio")
    for attention in ("causal", "block"):
        for see_tail in (True, False):
            plain, cached = _measure(arguments, attention, see_tail=see_tail)
            tail = "seen" if see_tail else "cut"
            print(f"{attention:<9} {tail:<6} {plain:>11.2f} {cached:>10.2f} {plain / cached:>7.2f}")


def _measure(arguments: argparse.Namespace, attention: str, *, see_tail: bool) -> tuple[float, float]:
    """Return the median seconds without and with the cache."""
    model, prompt = _model(arguments, attention), _prompt(arguments)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for number in range(arguments.runs + 1):
        texts = {}
        for is_cached in (False, True):
            began = time.perf_counter()
            texts[is_cached] = model.generate(
                prompt,
                use_cache=is_cached,
                seed=number,
                max_new_tokens=arguments.blocks * arguments.block_length,
                block_length=arguments.block_length,
                max_denoising_steps=arguments.steps,
                see_tail=see_tail,
                reuse_logits=False,
                eos_token_id=None,
            )
            if number:  # the first pair warms up
                taken[is_cached].append(time.perf_counter() - began)
        assert torch.equal(texts[False], texts[True]), "the cache changed a token"
    return statistics.median(taken[False]), statistics.median(taken[True])


def _model(arguments: argparse.Namespace, attention: str) -> Any:
    return exported_model(
        vocab_size=arguments.vocab_size,
        layers=arguments.layers,
        hidden=arguments.hidden,
        length=arguments.prompt + arguments.blocks * arguments.block_length,
        heads=arguments.heads,
        noise_type=1000.0,
        prompt_attention=attention,
    )


def _prompt(arguments: argparse.Namespace) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(4, arguments.vocab_size, (1, arguments.prompt), generator=draw)


if __name__ == "__main__":
    run_command(main)
