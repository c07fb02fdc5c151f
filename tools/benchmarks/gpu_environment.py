"""Facts about a GPU machine: versions, device, available kernels, and the ceilings that other figures are
relative to."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megadiff.config.command_line import CommandParser
from megadiff.errors import PlatformError, run_command

_EPILOG = """example:
  python tools/benchmarks/gpu_environment.py --output results

Prints one line per fact. Ceilings are medians of event-timed calls on random numbers (zeros run faster: less power).
"""

_PACKAGES = (
    "megatron-core", "transformer-engine", "transformer-engine-cu13", "transformer-engine-torch", "triton", "numpy",
    "pydantic",
)  # fmt: skip


def main() -> None:
    """Collect the facts, print them and write them to a file."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for environment.json (default: here)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():  # noqa: TID251
        raise PlatformError("these figures need a CUDA device and torch sees none here")
    facts: dict[str, object] = {}
    for part in (_software, _device, _ceilings):
        try:
            facts.update(part())
        except Exception as error:  # a part that fails is a result too; the others continue
            facts[part.__name__.strip("_")] = f"FAILED {type(error).__name__}: {str(error)[:200]}"
    for name, value in facts.items():
        print(f"{name:32} {value}")
    (arguments.output / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")


def milliseconds(call: Callable[[], object], *, rounds: int = 15, warm_up: int = 4) -> float:
    """Return the median device time of a call."""
    for _ in range(warm_up):
        call()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # noqa: TID251
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def product_ceiling(size: int = 8192) -> float:
    """Return the TFLOP/s of a large square bf16 product of random numbers, which no model can exceed on this device."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b) / 1e9


def _software() -> dict[str, object]:
    facts: dict[str, object] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
    }
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "absent"
    return facts


def _device() -> dict[str, object]:
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    answer = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    properties = torch.cuda.get_device_properties(0)  # noqa: TID251
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "nvidia-smi": answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else "absent",
    }


def _ceilings() -> dict[str, object]:
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    facts: dict[str, object] = {"bf16 8192^3 TFLOP/s": round(product_ceiling(size))}
    low = torch.float8_e4m3fn
    scale = torch.ones((), device="cuda")
    a8, b8 = a.to(low), b.to(low).t()
    spent = milliseconds(lambda: torch._scaled_mm(a8, b8, scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True))
    facts["FP8 8192^3 TFLOP/s"] = round(2 * size**3 / spent / 1e9)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    facts["copy TB/s"] = round(2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e9, 2)
    return facts


if __name__ == "__main__":
    run_command(main)
