"""Training steps on one GPU: tokens per second and model FLOP utilisation, in bf16 and FP8."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_environment import product_ceiling
from made_up import describe_made_up, prepare_made_up

from megadiff.errors import MegadiffError, PlatformError, run_command
from megadiff.model import cost
from megadiff.parallel.row_report import metrics_of
from megadiff.platform.machine import detect
from megadiff.platform.quiet import quiet
from megadiff.run_config import RunConfig

with quiet():
    from megadiff import build
    from megadiff.parallel.topology import process_group

_EPILOG = """examples:
  python tools/benchmarks/gpu_training.py --output results
  python tools/benchmarks/gpu_training.py --models 1.7b --precisions bf16 tensorwise --noise masked --seconds 60

Each line is a run of its own through megadiff's wiring, on made-up rows: AdamW, master weights in float32, rows of 2048
tokens, no recomputation where it fits. Model FLOPs are counted in full, a token's attention over its whole row
included and the head at every position, also where masked noise does not compute it (`cost.training_flops_per_token`);
recomputation never counts. MFU is the share of the datasheet's 989 TFLOP/s (dense bf16, also for FP8), "of ceiling"
that of a large bf16 product measured in the same run. A microbatch that does not fit in memory is halved.
"""

_DATASHEET = 989.0
_SEQ_LENGTH = 2048


@dataclass(frozen=True)
class Model:
    """A shape, and the microbatch to begin with."""

    layers: int
    hidden: int
    heads: int
    vocab_size: int
    micro_sequences: int


MODELS = {
    "1.7b": Model(28, 2048, 16, 50304, 16),
    "l20-d1536": Model(20, 1536, 12, 131072, 16),
    "3b": Model(19, 3072, 24, 131072, 8),
}
PRECISIONS = ("bf16", "tensorwise", "delayed", "blockwise")


def main() -> None:
    """Run every combination that time allows, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "tensorwise", "delayed"])
    parser.add_argument("--noise", default="balanced", help="noise.shift (default balanced)")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed (default 8)")
    parser.add_argument("--accumulation", type=int, default=2, help="microbatches of a step (default 2)")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no further run after this long")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for training.json (default: here)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():  # noqa: TID251
        raise PlatformError("these figures need a CUDA device and torch sees none here")
    began = time.monotonic()
    ceiling = product_ceiling()
    print(f"ceiling: {ceiling:.0f} TFLOP/s, bf16 8192^3 in this run\n")
    print("| model | precision | microbatch | tokens/s | TFLOP/s | MFU | of ceiling | peak GiB | loss |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    lines = []
    for precision in arguments.precisions:
        for name in arguments.models:
            if precision != "bf16" and find_spec("transformer_engine") is None:
                line: dict[str, Any] = {"failed": "Transformer Engine is not installed"}
            elif time.monotonic() - began > arguments.seconds:
                line = {"failed": f"left out: {arguments.seconds:.0f} s were over"}
            else:
                line = _survived(MODELS[name], precision, arguments)
            lines.append({"model": name, "precision": precision, **line})
            print(_row(lines[-1], ceiling), flush=True)
            (arguments.output / "training.json").write_text(json.dumps({"ceiling": ceiling, "runs": lines}, indent=1))


def _survived(model: Model, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The run's figures, with the largest power-of-two part of the microbatch that fits, or why there are none."""
    micro = model.micro_sequences
    while True:
        try:
            return _measured(model, precision, micro, arguments)
        except torch.OutOfMemoryError:
            if micro == 1:
                return {"failed": "out of memory with one row"}
            micro //= 2
        except MegadiffError as error:
            return {"failed": str(error)}
        except Exception as error:  # one run that fails must not take the others' figures with it
            return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        torch.cuda.empty_cache()  # noqa: TID251


def _measured(model: Model, precision: str, micro: int, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = _description(Path(folder), model, precision, micro, arguments)
        platform = detect("cuda")
        with process_group(platform, alone=True):
            platform.prepare_megatron()
            with quiet():
                run = build.wire(prepare_made_up(config, vocab_size=model.vocab_size), platform)
            try:
                return _timed(run, config, model, arguments.steps)
            finally:
                run.close()


def _timed(run: Any, config: RunConfig, model: Model, steps: int) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()  # noqa: TID251
    count = config.batch.global_sequences // config.batch.micro_sequences
    seconds, loss = [], float("nan")
    for number in range(steps + 3):
        rows = [next(run.rows) for _ in range(count)]
        torch.cuda.synchronize()  # noqa: TID251
        began = time.perf_counter()
        taken = run.step(rows, config.optimizer.lr)
        torch.cuda.synchronize()  # noqa: TID251
        if number >= 3:
            seconds.append(time.perf_counter() - began)
        loss = metrics_of(taken.total.tolist())["loss"]
    tokens = config.tokens_per_step / statistics.median(seconds)
    flops = cost.training_flops_per_token(config.shape(vocab_size=model.vocab_size))
    return {
        "micro_sequences": config.batch.micro_sequences,
        "tokens_per_s": tokens,
        "tflops": tokens * flops / 1e12,
        "flops_per_token": flops,
        "seconds": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,  # noqa: TID251
        "loss": loss,
    }


def _description(folder: Path, model: Model, precision: str, micro: int, arguments: argparse.Namespace) -> RunConfig:
    tree = {
        "platform": "cuda",
        "model": {
            "layers": model.layers, "hidden": model.hidden, "heads": model.heads, "seq_length": _SEQ_LENGTH,
            "qk_norm": "head",
        },
        "noise": {"shift": arguments.noise},
        "batch": {"global_sequences": micro * arguments.accumulation, "micro_sequences": micro},
        "precision": {"compute": "bf16", **({} if precision == "bf16" else {"fp8": precision})},
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "schedule": {"steps": 10_000},
        "log": {"tensorboard": False},
    }  # fmt: skip
    return describe_made_up(folder, tree, vocab_size=model.vocab_size)


def _row(line: dict[str, Any], ceiling: float) -> str:
    head = f"| {line['model']} | {line['precision']} |"
    if "failed" in line:
        return f"{head} FAILED: {line['failed']} | | | | | | |"
    tflops = line["tflops"]
    return (
        f"{head} {line['micro_sequences']} | {line['tokens_per_s']:,.0f} | {tflops:.0f} | {tflops / _DATASHEET:.1%} | "
        f"{tflops / ceiling:.1%} | {line['peak_gib']:.1f} | {line['loss']:.3f} |"
    )


if __name__ == "__main__":
    run_command(main)
