"""Timing of the fused output head on the CPU against a transcription of the objective, bare products and cross-
entropy."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform as host
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processor import processor
from torch import Tensor
from transcription import transcribed_loss

from megadiff.config.command_line import CommandParser
from megadiff.diffusion.mixing import HybridMixing
from megadiff.errors import run_command
from megadiff.loss.fused_lm_head import add_product, fused_objective
from megadiff.loss.lm_head import LossInputs, LossSpec, loss_token_indices

_EPILOG = """example:
  python tools/benchmarks/head.py

Forward and backward passes are in float32 on one thread, each run in a fresh process. CPU seconds include those of the
system, which fetches the pages of tensors too large to be kept for reuse. `extra` is the peak resident memory minus
that before the run and minus the two gradients. Under masked noise half the tokens are masks. The bare products and the
cross-entropy process all tokens, in chunks of the fused head's size; they hold the logits of two chunks at once.
"""
MASK, CHUNK = 3, 256
SHIFTS = {"balanced": 0.0, "masked": -1000.0}
_PAIRS = (
    ("fused balanced", "transcription balanced"),
    ("fused balanced", "products"),
    ("fused balanced", "cross-entropy"),
    ("fused masked", "transcription masked"),
    ("fused masked", "products"),
    ("fused masked", "cross-entropy"),
)


def main() -> None:
    """Run the variants in turn and print the table."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each variant, taken in turn")
    parser.add_argument("--vocab-size", type=int, default=131072)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(_measure(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(arguments.repetitions):
        for name in VARIANTS:
            found.setdefault(name, []).append(_in_a_process(arguments, name))
            print(f"{name:<24}{found[name][-1]}", file=sys.stderr)
    print(_table(found, arguments))


def _in_a_process(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    shape = [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in ("vocab_size", "tokens", "hidden")]
    done = subprocess.run(
        [sys.executable, __file__, "--variant", name, *shape], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    question = _question(arguments)
    run = VARIANTS[arguments.variant]
    before, began = _status_bytes("VmRSS"), os.times()
    loss = run(*question)
    ended = os.times()
    gradients = sum(4 * tensor.numel() for tensor in question[:2])
    return {
        "seconds": ended.user - began.user + ended.system - began.system,
        "system_seconds": ended.system - began.system,
        "extra_bytes": max(0, _status_bytes("VmHWM") - before - gradients),
        "loss": loss,
    }


def _question(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.hidden, generator=g)
    weight = torch.randn(arguments.vocab_size, arguments.hidden, generator=g).mul_(arguments.hidden**-0.5)
    clean = torch.randint(MASK + 1, arguments.vocab_size, (arguments.tokens,), generator=g)
    log_snr = torch.logit(torch.rand(arguments.tokens, generator=g).clamp(1e-3, 1 - 1e-3))
    return hidden.requires_grad_(), weight.requires_grad_(), clean, log_snr


def _fused(name: str) -> Callable[..., float]:
    def run(hidden: Tensor, weight: Tensor, clean: Tensor, log_snr: Tensor) -> float:
        process = HybridMixing(weight.shape[0], MASK, SHIFTS[name])
        noised = _noised(clean, name)
        computed = loss_token_indices(noised, torch.ones_like(noised, dtype=torch.bool), process)
        tokens = LossInputs(clean, noised, log_snr, computed)
        loss = fused_objective(hidden, weight, tokens, LossSpec(process), chunk_tokens=CHUNK).loss
        loss.backward()
        return loss.item()

    return run


def _transcription(name: str) -> Callable[..., float]:
    def run(hidden: Tensor, weight: Tensor, clean: Tensor, log_snr: Tensor) -> float:
        noised = _noised(clean, name)
        loss = transcribed_loss(hidden, weight, clean, noised, log_snr, mask_id=MASK, shift=SHIFTS[name])
        loss.backward()
        return loss.item()

    return run


def _noised(clean: Tensor, name: str) -> Tensor:
    """Return the clean tokens with half of them replaced by masks and, under hybrid noise, a quarter by other
    tokens."""
    noised = clean.clone()
    noised[::2] = MASK
    if name != "masked":
        noised[1::4] = clean.flip(0)[1::4]
    return noised


def _products(hidden: Tensor, weight: Tensor, clean: Tensor, log_snr: Tensor) -> float:
    _in_chunks(hidden, weight, lambda logits, rows: logits)
    return math.nan


def _cross_entropy(hidden: Tensor, weight: Tensor, clean: Tensor, log_snr: Tensor) -> float:
    def slope(logits: Tensor, rows: slice) -> Tensor:
        logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
        logits.div_(logits.sum(dim=-1, keepdim=True))
        return logits.scatter_add_(-1, clean[rows, None], torch.full((len(logits), 1), -1.0))

    _in_chunks(hidden, weight, slope)
    return math.nan


@torch.no_grad()
def _in_chunks(hidden: Tensor, weight: Tensor, slope: Callable[[Tensor, slice], Tensor]) -> None:
    """Compute logits in chunks, transform them by `slope`, and compute the two products that follow.

    Results are kept as in the fused head.
    """
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    for first in range(0, len(hidden), CHUNK):
        rows = slice(first, first + CHUNK)
        grad = slope(hidden[rows] @ weight.t(), rows)
        torch.mm(grad, weight, out=grad_hidden[rows])
        add_product(grad_weight, grad.t(), hidden[rows], is_first=first == 0)


VARIANTS: dict[str, Callable[..., float]] = {
    "products": _products,
    "fused balanced": _fused("balanced"),
    "fused masked": _fused("masked"),
    "cross-entropy": _cross_entropy,
    "transcription balanced": _transcription("balanced"),
    "transcription masked": _transcription("masked"),
}


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{key}:")) * 1024


def _table(found: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> str:
    def middle(name: str, key: str) -> Any:
        return statistics.median(run[key] for run in found[name])

    lines = [
        f"{processor()}, one thread, torch {torch.__version__}, Python {host.python_version()}; V = "
        f"{arguments.vocab_size}, {arguments.tokens} tokens, hidden {arguments.hidden}, float32, forward and backward",
        "",
        "| variant | CPU seconds, median of runs | least | of them the system's | extra peak MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, runs in found.items():
        least = min(run["seconds"] for run in runs)
        lines.append(
            f"| {name} | {middle(name, 'seconds'):.1f} ({len(runs)}) | {least:.1f} | "
            f"{middle(name, 'system_seconds'):.1f} | {middle(name, 'extra_bytes') / 2**20:.0f} |"
        )
    lines += ["", "| ratio | time | extra peak memory | losses differ, relative |", "| --- | --- | --- | --- |"]
    for ours, theirs in _PAIRS:
        losses = middle(ours, "loss"), middle(theirs, "loss")
        apart = "" if math.isnan(losses[1]) else f"{abs(losses[0] / losses[1] - 1):.0e}"
        time_ratio = middle(ours, "seconds") / middle(theirs, "seconds")
        memory = middle(ours, "extra_bytes") / max(1, middle(theirs, "extra_bytes"))
        lines.append(f"| {ours} / {theirs} | {time_ratio:.3f} | {memory:.3f} | {apart} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
