"""Training steps on one GPU: tokens per second and model FLOP utilisation, in bf16 and FP8."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_environment import add_platform, device_of, product_ceiling
from made_up import describe_made_up, prepare_made_up

from megadiff.config.command_line import CommandParser
from megadiff.errors import MegadiffError, PlatformError, run_command
from megadiff.model import cost
from megadiff.parallel.step_metrics import metrics_of
from megadiff.platform.machine import Platform
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig

with quiet():
    from megadiff.model.kernels import describe_kernels
    from megadiff.parallel.topology import process_group
    from megadiff.run import build
    from megadiff.run.context import machine_for

_EPILOG = """examples:
  python tools/benchmarks/gpu_training.py --output results
  python tools/benchmarks/gpu_training.py --models 1.7b --precisions bf16 tensorwise --noise masked --seconds 60

Each line is a separate run, wired as in training, on random sequences: AdamW, master weights in float32, no
recomputation if it fits. Model FLOPs are counted in full: a token's attention over its whole sequence,
and the head at every position, even where masked noise does not compute it (`cost.matrix_flops_per_token`).
Recomputation never counts. MFU is relative to the datasheet's 989 TFLOP/s (dense bf16, also for FP8), "of ceiling" to
a large bf16 product measured in the same run. A microbatch that does not fit in memory is halved. The last column
names the kernels that ran; FP8 that no layer used is a failure. A run that would not end in time is left out, which is
no failure, and neither is FP8 without Transformer Engine.
"""

_DATASHEET = 989.0


@dataclass(frozen=True)
class Model:
    """The shape of a model, and its first microbatch size."""

    layers: int
    hidden: int
    heads: int
    vocab_size: int
    micro_batch_size: int


MODELS = {
    "1.7b": Model(28, 2048, 16, 50304, 8),
    "l20-d1536": Model(20, 1536, 12, 131072, 16),
    "3b": Model(19, 3072, 24, 131072, 4),
    "tiny": Model(2, 128, 2, 512, 2),
}
PRECISIONS = ("bf16", "tensorwise", "delayed", "blockwise")
_UNTIMED = 3
"""Number of first steps that are not timed, in which kernels are compiled and memory is allocated."""


class LateError(Exception):
    """The time limit, reached before enough steps were timed."""


class Clock:
    """The remaining time, and an estimate of the time of a run from the previous one."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self._setup = 15.0
        self._flops_per_second = 250e12

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def wanted(self, flops: float) -> float:
        """Return the seconds that a run with `flops` FLOPs will probably take."""
        return self._setup + flops / self._flops_per_second

    def learn(self, *, seconds: float, flops: float, flops_per_second: float) -> None:
        """Record the total seconds of a run and the rate of its timed steps."""
        self._flops_per_second = flops_per_second
        self._setup = max(0.0, seconds - flops / flops_per_second)


def main() -> None:
    """Run every combination that fits into the time, print and write the table."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    usual = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=usual, help="`tiny` tries the script itself")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--noise", default="balanced", help="noise.shift (default balanced)")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed (default 8)")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a sequence (default 2048)")
    parser.add_argument("--accumulation", type=int, default=2, help="microbatches of a step (default 2)")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="leave out runs that would end later (default 240)"
    )
    add_platform(parser)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for training.json (default: here)")
    arguments = parser.parse_args()
    clock = Clock(arguments.seconds)
    ceiling = product_ceiling("cuda") if device_of(arguments) == "cuda" else None
    if ceiling is not None:
        print(f"ceiling: {ceiling:.0f} TFLOP/s, bf16 8192^3 in this run\n")
    print("| model | precision | microbatch | tokens/s | TFLOP/s | MFU | of ceiling | peak GiB | loss | kernels |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in arguments.models:
        for precision in arguments.precisions:
            if precision != "bf16" and find_spec("transformer_engine") is None:
                line: dict[str, Any] = {"skipped": "Transformer Engine cannot be imported"}
            else:
                line = _survived(MODELS[name], precision, arguments, clock)
            lines.append({"model": name, "precision": precision, **line})
            print(_sequence(lines[-1], ceiling), flush=True)
            (arguments.output / "training.json").write_text(json.dumps({"ceiling": ceiling, "runs": lines}, indent=1))
    if lost := [f"{line['model']} {line['precision']}" for line in lines if "failed" in line]:
        raise MegadiffError(f"no figure for {', '.join(lost)}; the lines above give the reasons")


def _survived(model: Model, precision: str, arguments: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Return the figures of a run, after halving the microbatch until it fits, or the reason why there are none."""
    micro = model.micro_batch_size
    while True:
        try:
            return _measured(model, precision, micro, arguments, clock)
        except torch.OutOfMemoryError:
            if micro == 1:
                return {"failed": "out of memory with one sequence"}
            micro //= 2  # the next try starts outside this block, when the frames of the failed one are gone
        except LateError as error:
            return {"skipped": str(error)}
        except MegadiffError as error:
            return {"failed": str(error)}
        except Exception as error:  # one failed run must not lose the figures of the others
            return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _measured(model: Model, precision: str, micro: int, arguments: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    gc.collect()  # the previous model is kept alive by reference cycles through its hooks
    torch.cuda.empty_cache()  # noqa: TID251
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = _description(Path(folder), model, precision, micro, arguments)
        flops = (arguments.steps + _UNTIMED) * config.tokens_per_step * _flops_per_token(config, model)
        if clock.wanted(flops) > clock.left:
            raise LateError(f"would take {clock.wanted(flops):.0f} s and {max(0.0, clock.left):.0f} s are left")
        platform = machine_for(config)
        with process_group(platform, alone=True):
            platform.prepare_megatron()
            with quiet():
                run = build.build_trainer(prepare_made_up(config, vocab_size=model.vocab_size), platform)
            try:
                found = _timed(run, config, model, platform, arguments.steps, clock)
            finally:
                run.close()
            _check_precision(run, precision)
        done = (len(found["seconds"]) + _UNTIMED) * config.tokens_per_step * found["flops_per_token"]
        clock.learn(seconds=time.monotonic() - began, flops=done, flops_per_second=found["tflops"] * 1e12)
        return {**found, "kernels": describe_kernels(config.parallel, config.precision, platform)}


def _check_precision(run: Any, precision: str) -> None:
    """Refuse figures under the name of another precision; layers know the precision of their last computation."""
    modules = [module for chunk in run.step.chunks for module in chunk.modules()]
    in_fp8 = sum(bool(getattr(module, "fp8", False)) for module in modules)
    if (in_fp8 > 0) != (precision != "bf16"):
        raise PlatformError(f"precision {precision} was requested and {in_fp8} modules computed in FP8")


def _flops_per_token(config: RunConfig, model: Model) -> float:
    return cost.matrix_flops_per_token(config.shape(vocab_size=model.vocab_size))


def _timed(run: Any, config: RunConfig, model: Model, platform: Platform, steps: int, clock: Clock) -> dict[str, Any]:
    if not platform.is_cpu:
        torch.cuda.reset_peak_memory_stats()  # noqa: TID251
    count = config.batch.global_batch_size // config.batch.micro_batch_size
    seconds, loss = [], float("nan")
    for number in range(steps + _UNTIMED):
        if clock.left < 0:  # three timed steps suffice
            if len(seconds) >= min(3, steps):
                break
            raise LateError(f"the time was over after {number} of {steps + _UNTIMED} steps")
        sequences = [next(run.microbatches) for _ in range(count)]
        platform.synchronize()
        began = time.perf_counter()
        output = run.step(sequences, config.optimizer.lr)
        platform.synchronize()
        if number >= _UNTIMED:
            seconds.append(time.perf_counter() - began)
        loss = metrics_of(output.sums.tolist())["loss"]
    tokens = config.tokens_per_step / statistics.median(seconds)
    flops = _flops_per_token(config, model)
    return {
        "micro_batch_size": config.batch.micro_batch_size,
        "tokens_per_s": tokens,
        "tflops": tokens * flops / 1e12,
        "flops_per_token": flops,
        "seconds": seconds,
        "peak_gib": platform.peak_bytes() / 2**30,
        "loss": loss,
    }


def _description(folder: Path, model: Model, precision: str, micro: int, arguments: argparse.Namespace) -> RunConfig:
    tree = {
        "platform": arguments.platform,
        "model": {
            "layers": model.layers, "hidden": model.hidden, "heads": model.heads, "seq_length": arguments.seq_length,
            "qk_norm": "head",
        },
        "noise": {"shift": arguments.noise},
        "batch": {"global_batch_size": micro * arguments.accumulation, "micro_batch_size": micro},
        "precision": {"compute": "bf16", **({} if precision == "bf16" else {"fp8": precision})},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "schedule": {"steps": 10_000},
        "log": {"tensorboard": False},
    }  # fmt: skip
    return describe_made_up(folder, tree, vocab_size=model.vocab_size)


def _sequence(line: dict[str, Any], ceiling: float | None) -> str:
    head = f"| {line['model']} | {line['precision']} |"
    if "failed" in line:
        return f"{head} FAILED: {line['failed']} | | | | | | | |"
    if "skipped" in line:
        return f"{head} left out: {line['skipped']} | | | | | | | |"
    tflops = line["tflops"]
    of_ceiling = "" if ceiling is None else f"{tflops / ceiling:.1%}"
    return (
        f"{head} {line['micro_batch_size']} | {line['tokens_per_s']:,.0f} | {tflops:.0f} | {tflops / _DATASHEET:.1%} | "
        f"{of_ceiling} | {line['peak_gib']:.1f} | {line['loss']:.3f} | {line['kernels']} |"
    )


if __name__ == "__main__":
    run_command(main)
