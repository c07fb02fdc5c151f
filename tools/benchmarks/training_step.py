"""Cost of a training step, against a hand-written PyTorch loop, and of diffusion steps against next-token steps."""

from __future__ import annotations

import argparse
import gc
import os
import platform as host
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from made_up import describe_made_up, prepare_made_up
from processor import processor
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from megadiff.config.command_line import CommandParser
from megadiff.diffusion.config import noise_config
from megadiff.diffusion.processes.gidd_snr import ShiftName
from megadiff.errors import run_command
from megadiff.methods import MethodConfig
from megadiff.parallel.step_metrics import metrics_of
from megadiff.platform.machine import detect
from megadiff.platform.quiet import quiet

with quiet():
    from megadiff.model.denoiser import Denoiser
    from megadiff.model.layers import CompiledBlock
    from megadiff.parallel.topology import process_group
    from megadiff.run import build
    from megadiff.run.context import RunContext
    from megadiff.train.loop import Trainer, TrainStep

_EPILOG = """examples:
  OMP_NUM_THREADS=1 python tools/benchmarks/training_step.py
  OMP_NUM_THREADS=1 python tools/benchmarks/training_step.py --vocab-size 32768 --only noise
  OMP_NUM_THREADS=1 python tools/benchmarks/training_step.py --size toy --rounds 41 --steps 3 --compile --counts

One process and one thread, float32, AdamW, clipping at 1. Times are CPU seconds of the process, its loader thread
included. Both sides of a ratio take turns, and their medians are compared. `plain` is a hand-written next-token model
(nn.Linear, scaled_dot_product_attention, fused AdamW). Before anything is timed it takes the same steps from the same
weights on the same sequences, and the benchmark fails unless its losses are those of megadiff. --compile adds a side
with `precision.compile`, whose compilation is not timed. --counts prints the calls of Python functions and the
outermost torch operations of a step, and how many of them a block adds for each microbatch.
"""

_LR = 1e-4
_BOS = 0
_SAME_LOSS = 1e-5
_NOISES: tuple[ShiftName, ...] = ("masked", "balanced", "uniform")


@dataclass(frozen=True)
class Size:
    """The shape of the model and its batch."""

    layers: int
    hidden: int
    heads: int
    seq_length: int
    vocab_size: int
    """Number of ids including the mask, which is the last one."""
    sequences: int
    """Number of sequences per step."""
    micro_batch_size: int


SIZES = {
    "25m": Size(8, 512, 8, seq_length=512, vocab_size=16384, sequences=4, micro_batch_size=2),
    "toy": Size(4, 64, 2, seq_length=64, vocab_size=512, sequences=4, micro_batch_size=2),
}
"""25m: 25.2 million parameters in blocks, 8.4 in the head, so the head is a quarter of the matrix products."""


def main() -> None:
    """Check the losses, time the steps, and print both tables."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(description=__doc__, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--size", choices=sorted(SIZES), default="25m", help="model and batch (default 25m)")
    parser.add_argument("--vocab-size", type=int, help="another vocabulary, the mask included")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each side (default 9)")
    parser.add_argument("--steps", type=int, default=1, help="steps of each side in a round (default 1)")
    parser.add_argument("--only", choices=("plain", "noise"), help="one of the two tables")
    parser.add_argument("--compile", action="store_true", help="also time megadiff with precision.compile")
    parser.add_argument("--counts", action="store_true", help="also count calls and operations")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    if arguments.vocab_size is not None:
        size = Size(**{**vars(size), "vocab_size": arguments.vocab_size})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, process_group(detect("cpu"), alone=True):
        _print_setting(size)
        for kind in ("plain", "noise"):
            if arguments.only in (None, kind):
                measure(
                    size,
                    Path(folder, kind),
                    kind=kind,
                    rounds=arguments.rounds,
                    steps=arguments.steps,
                    is_compiled=arguments.compile,
                )
        if arguments.counts:
            print_counts(size, Path(folder), is_compiled=arguments.compile)


def measure(
    size: Size, folder: Path, *, kind: str, rounds: int, steps: int = 1, is_compiled: bool = False
) -> dict[str, float]:
    """Time the sides of one table, print it, and return each side's ratio to the last one.

    The default process group must be open.

    Args:
        folder: a new folder for data and run.
        kind: `plain` for megadiff's next-token step against `PlainModel`'s; `noise` for diffusion steps against
            megadiff's next-token step.
        rounds: number of times that each side is timed.
        steps: number of steps that are timed together.
        is_compiled: add a side with compiled blocks to `plain`.
    """
    trainer = Wired.open(size, folder)
    try:
        if kind == "plain":
            sides = trainer.sides(size, is_compiled=is_compiled)
        else:
            sides = {name: trainer.side("gidd", name) for name in _NOISES} | {"next token": trainer.side("next_token")}
        seconds, waited = _alternate(sides, rounds, steps)
    finally:
        trainer.close()
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    *_, base = medians.values()
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        wait = f"waits {1e3 * statistics.median(waited[name]):.2f} ms for sequences"
        print(f"{name:12} {median:8.4f} CPU-s a step ({low:.4f} to {high:.4f})   ratio {median / base:.3f}   {wait}")
    return {name: median / base for name, median in medians.items()}


def print_counts(size: Size, folder: Path, *, is_compiled: bool) -> None:
    """Print the calls and operations of a step of each side, and those that a block adds for each microbatch."""
    found = []
    for layers in (size.layers, size.layers + 1):
        larger = replace(size, layers=layers)
        trainer = Wired.open(larger, folder / f"counted{layers}")
        try:
            found.append({name: _counts(side) for name, side in trainer.sides(larger, is_compiled=is_compiled).items()})
        finally:
            trainer.close()
    microbatches = size.sequences // size.micro_batch_size
    for name, counts in found[0].items():
        for what, count in counts.items():
            added = (found[1][name][what] - count) / microbatches
            print(f"{name:12} {count:6} {what} a step, {added:.0f} per block and microbatch")


def _counts(side: Side) -> dict[str, int]:
    """Return the number of calls of Python functions in a step, and of torch operations outside any other."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    side()  # compiles
    gc.collect()
    sys.setprofile(count)
    try:
        side()
    finally:
        sys.setprofile(None)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        side()
    events: Any = profiled.events()
    names = [(event.name, event.cpu_parent.name if event.cpu_parent else "") for event in events]
    outermost = sum(name.startswith("aten::") and not parent.startswith("aten::") for name, parent in names)
    return {"Python calls": calls, "operations": outermost}


class MegadiffTraining:
    """megadiff's own step on sequences from its own loader."""

    def __init__(
        self, step: TrainStep, sequences: Iterator[Any], microbatches: int, *, is_compiled: bool = False
    ) -> None:
        self._step, self._sequences, self._microbatches = step, sequences, microbatches
        model = step.chunks[0].module
        assert isinstance(model, Denoiser)
        self._model, self._block = model, CompiledBlock(model.decoder) if is_compiled else None
        self.waited_s = 0.0
        """Wall time that the last step waited for its sequences."""

    def __call__(self) -> float:
        """Take a step and return its loss."""
        self._model.compiled_block = self._block
        began = time.perf_counter()
        sequences = [next(self._sequences) for _ in range(self._microbatches)]
        self.waited_s = time.perf_counter() - began
        return metrics_of(self._step(sequences, _LR).sums.tolist())["loss"]


class PlainTraining:
    """The same next-token training as a plain PyTorch loop, starting from the same weights."""

    def __init__(self, size: Size, prepared: RunContext, chunk: nn.Module) -> None:
        """Start from the weights of a bare model chunk of megadiff's that holds the whole model."""
        self._size, self._prepared = size, prepared
        self._samples = 0
        self.waited_s = 0.0
        self.model = PlainModel(size, norm_eps=prepared.config.model.norm_eps)
        self.model.take_weights(chunk)
        settings: Any = prepared.config.optimizer  # the AdamW member adds its betas and eps to the section
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=_LR,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )

    def __call__(self) -> float:
        """Take a step and return its loss."""
        size, total = self._size, 0.0
        self._optimizer.zero_grad()
        for first in range(self._samples, self._samples + size.sequences, size.micro_batch_size):
            sequences = self._prepared.data.train.sequences(list(range(first, first + size.micro_batch_size)))
            targets = torch.from_numpy(sequences.astype(np.int64))
            inputs = torch.cat([torch.full((len(sequences), 1), _BOS), targets[:, :-1]], dim=1)
            logits = self.model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            loss = loss / (size.sequences * size.seq_length)
            loss.backward()
            total += float(loss.detach())
        self._samples += size.sequences
        nn.utils.clip_grad_norm_(self.model.parameters(), self._prepared.config.optimizer.clip_grad)
        self._optimizer.step()
        return total


Side = MegadiffTraining | PlainTraining


class PlainBlock(nn.Module):
    """Pre-norm attention with rotary embeddings and QK-norm per head, then a squared-ReLU MLP."""

    def __init__(self, size: Size, norm_eps: float) -> None:
        super().__init__()
        hidden, self.heads = size.hidden, size.heads
        self.attention_norm = nn.RMSNorm(hidden, eps=norm_eps)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.q_norm = nn.RMSNorm(hidden // size.heads, eps=norm_eps)
        self.k_norm = nn.RMSNorm(hidden // size.heads, eps=norm_eps)
        self.projection = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=norm_eps)
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map [B, L, hidden] to [B, L, hidden]."""
        batch, length, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = qkv.unbind(2)
        q, k = _rotate(self.q_norm(q), cos, sin), _rotate(self.k_norm(k), cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.mlp_norm(x))).square())


class PlainModel(nn.Module):
    """The denoiser of `Size` as a plain causal language model; its logits cover the real tokens alone."""

    def __init__(self, size: Size, *, norm_eps: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocab_size, size.hidden)
        self.blocks = nn.ModuleList(PlainBlock(size, norm_eps) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, eps=norm_eps)
        self.head = nn.Linear(size.hidden, size.vocab_size - 1, bias=False)
        half = size.hidden // size.heads // 2
        angles = torch.outer(torch.arange(size.seq_length), 10000.0 ** (-torch.arange(half) / half))
        angles = torch.cat([angles, angles], dim=1)[:, None]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [B, L] to logits [B, L, real tokens] of the next token."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))

    @torch.no_grad()
    def take_weights(self, chunk: nn.Module) -> None:
        """Copy the weights of megadiff's denoiser, whose norms store gain - 1 and whose q, k, v are stored head by
        head."""
        weights = dict(chunk.named_parameters())
        self.embedding.weight.copy_(weights["embedding.word_embeddings.weight"][: len(self.embedding.weight)])
        self.norm.weight.copy_(1.0 + weights["decoder.final_layernorm.weight"])
        self.head.weight.copy_(weights["output_layer.weight"][: len(self.head.weight)])
        for number, block in enumerate(self.blocks):
            assert isinstance(block, PlainBlock)
            place = f"decoder.layers.{number}."
            own = {name.removeprefix(place): w for name, w in weights.items() if name.startswith(place)}
            qkv = own["self_attention.linear_qkv.weight"].unflatten(0, (block.heads, 3, -1))
            block.qkv.weight.copy_(qkv.transpose(0, 1).flatten(0, 2))
            block.projection.weight.copy_(own["self_attention.linear_proj.weight"])
            block.up.weight.copy_(own["mlp.linear_fc1.weight"])
            block.down.weight.copy_(own["mlp.linear_fc2.weight"])
            block.q_norm.weight.copy_(1.0 + own["self_attention.q_layernorm.weight"])
            block.k_norm.weight.copy_(1.0 + own["self_attention.k_layernorm.weight"])
            block.attention_norm.weight.copy_(1.0 + own["input_layernorm.weight"])
            block.mlp_norm.weight.copy_(1.0 + own["pre_mlp_layernorm.weight"])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the rotary embedding of x [B, L, H, D] with its halves paired; `cos` and `sin` are [L, 1, D]."""
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-other, one], dim=-1) * sin


@dataclass(frozen=True)
class Wired:
    """One model trainer by `megadiff.run.build`, to be trained with several objectives in turn."""

    prepared: RunContext
    """Context of the next-token run."""
    run: Trainer
    opened: list[Any]
    """Loaders that have to be closed."""

    @classmethod
    def open(cls, size: Size, folder: Path) -> Wired:
        """Write a corpus and wire the next-token run; the default process group must be open."""
        platform = detect("cpu")
        platform.prepare_megatron()
        folder.mkdir()
        config = describe_made_up(folder, _description(size), vocab_size=size.vocab_size)
        prepared = prepare_made_up(config, vocab_size=size.vocab_size)
        with quiet():
            return cls(prepared, build.build_trainer(prepared, platform), [])

    def side(self, method: Literal["next_token", "gidd"], noise: ShiftName = "balanced") -> MegadiffTraining:
        """Return the step of the same model with another training method."""
        if method == "next_token":
            return MegadiffTraining(self.run.step, self.run.microbatches, self.run.microbatches_of(0))
        own = self.prepared.config
        changes = {"method": MethodConfig(name=method), "noise": noise_config(shift=noise)}
        config = own.model_copy(update=changes)
        prepared = replace(self.prepared, config=config)
        step = self.run.step
        _, trained_by = build.build_loss(prepared, detect("cpu"))
        loader = build.sequence_loader(prepared, trained_by, step.topology, 0)
        self.opened.append(loader)
        other = build.training_step(
            prepared, trained_by, step.chunks, step.optimizer, step.topology, detect("cpu"), check=step.check
        )
        return MegadiffTraining(other, (microbatch.content for microbatch in loader), self.run.microbatches_of(0))

    def sides(self, size: Size, *, is_compiled: bool) -> dict[str, Side]:
        """Return the sides that are compared with the plain loop, which is the last; their first steps are equal."""
        step, sequences, microbatches = self.run.step, self.run.microbatches, self.run.microbatches_of(0)
        next_token = self.side("next_token")
        plain = PlainTraining(size, self.prepared, step.chunks[0].module)
        check_equal(next_token, plain)
        sides: dict[str, Side] = {"megadiff": next_token}
        if is_compiled:
            sides["compiled"] = MegadiffTraining(step, sequences, microbatches, is_compiled=True)
            check_equal(sides["compiled"], plain, steps=1)
        return sides | {"plain": plain}

    def close(self) -> None:
        """Close the loaders and the run."""
        for loader in self.opened:
            loader.close()
        self.run.close()


def check_equal(one: Side, other: Side, *, steps: int = 3) -> None:
    """Take the same steps on both sides; raise SystemExit if the losses differ by more than the order of summation
    explains."""
    losses = [(one(), other()) for _ in range(steps)]
    worst = max(abs(a - b) / abs(b) for a, b in losses)
    print(f"losses of {steps} steps: " + ", ".join(f"{a:.6f} and {b:.6f}" for a, b in losses) + f"; apart {worst:.1e}")
    if not worst < _SAME_LOSS:
        raise SystemExit("the two sides do not train the same model: nothing was timed")


def _alternate(
    sides: Mapping[str, Side], rounds: int, steps: int = 1
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the CPU seconds of a step of each side and the wall seconds it waited for sequences; the sides take
    turns of `steps` steps."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    waited: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            gc.collect()
            began = time.process_time()
            for _ in range(steps):
                side()
            if number:  # the first allocates
                seconds[name].append((time.process_time() - began) / steps)
                waited[name].append(side.waited_s)
    return seconds, waited


def _description(size: Size) -> dict[str, Any]:
    model = {key: getattr(size, key) for key in ("layers", "hidden", "heads", "seq_length")}
    return {
        "platform": "cpu",
        "model": model | {"head_init": 0.02},
        "method": {"name": "next_token"},
        "batch": {"global_batch_size": size.sequences, "micro_batch_size": size.micro_batch_size},
        "precision": {"compute": "fp32"},
        "optimizer": {"name": "adamw", "lr": _LR, "weight_decay": 0.1, "clip_grad": 1.0},
        "schedule": {"steps": 100_000},
        "log": {"tensorboard": False},
    }


def _print_setting(size: Size) -> None:
    blocks, head = 12e-6 * size.layers * size.hidden**2, 1e-6 * size.vocab_size * size.hidden
    print(f"machine      {processor()}, {os.cpu_count()} cores, one thread used")
    print(
        f"versions     Python {host.python_version()}, torch {torch.__version__}, "
        f"megatron-core {version('megatron-core')}"
    )
    print(
        f"model        {size.layers} layers, hidden {size.hidden}, {size.heads} heads, vocabulary {size.vocab_size}: "
        f"{blocks:.1f} million parameters in blocks, {head:.1f} in the head; float32"
    )
    print(
        f"step         {size.sequences} sequences of {size.seq_length} tokens, microbatches of {size.micro_batch_size}"
    )


if __name__ == "__main__":
    run_command(main)
