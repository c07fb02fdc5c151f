"""Facts about a GPU machine: versions, device, available kernels, and the ceilings that other figures are
relative to."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

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


_NEW_CUDNN = 91900
"""First cuDNN whose attention torch prefers on an H100; an older one on LD_LIBRARY_PATH hides the bundled one."""


def main() -> None:
    """Collect the facts, print them and write them to a file, part by part."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for environment.json (default: here)")
    add_platform(parser)
    arguments = parser.parse_args()
    device = device_of(arguments)
    facts: dict[str, object] = {}
    for part in (_software, _device, _ceilings, _attention):
        try:
            found = part(device)
        except Exception as error:  # a part that fails is a result too; the others continue
            found = {part.__name__.strip("_"): f"FAILED {type(error).__name__}: {str(error)[:200]}"}
        for name, value in found.items():
            print(f"{name:32} {value}", flush=True)
        facts.update(found)
        (arguments.output / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")


def add_platform(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a CPU try the script itself."""
    parser.add_argument(
        "--platform", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script itself, at small sizes"
    )


def device_of(arguments: argparse.Namespace) -> str:
    """Return the device to measure on.

    Raises:
        PlatformError: it is a GPU, and torch sees none.
    """
    if arguments.platform == "cuda" and not torch.cuda.is_available():  # noqa: TID251
        raise PlatformError("these figures need a CUDA device and torch sees none here")
    return arguments.platform


def milliseconds(call: Callable[[], object], *, device: str, rounds: int = 15, warm_up: int = 4) -> float:
    """Return the median device time of a call; on a CPU, which tries the script alone, that of the clock."""
    rounds, warm_up = (rounds, warm_up) if device == "cuda" else (1, 0)
    for _ in range(warm_up):
        call()
    found = []
    for _ in range(rounds):
        if device == "cpu":
            began = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - began))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # noqa: TID251
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def product_ceiling(device: str) -> float:
    """Return the TFLOP/s of a large square bf16 product of random numbers, which no model can exceed on this device."""
    size = _size(device)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, device=device) / 1e9


def _size(device: str) -> int:
    return 8192 if device == "cuda" else 64


def _software(_: str) -> dict[str, object]:
    facts: dict[str, object] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
    }
    found = torch.backends.cudnn.version()
    facts["cuDNN"] = f"{found}, OLD: wanted {_NEW_CUDNN} or newer" if found and found < _NEW_CUDNN else found
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "absent"
    return facts


def _device(device: str) -> dict[str, object]:
    if device == "cpu":
        return {"device": "CPU"}
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


def _ceilings(device: str) -> dict[str, object]:
    size = _size(device)
    facts: dict[str, object] = {f"bf16 {size}^3 TFLOP/s": round(product_ceiling(device))}
    source = torch.empty(2**30 if device == "cuda" else 2**16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = milliseconds(lambda: target.copy_(source), device=device)
    facts["copy TB/s"] = round(2 * source.numel() / spent / 1e9, 2)
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scale = torch.ones((), device=device)
    try:
        spent = milliseconds(
            lambda: torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=device == "cuda"),
            device=device,
        )
        facts[f"FP8 {size}^3 TFLOP/s"] = round(2 * size**3 / spent / 1e9)
    except Exception as error:  # the device may be older than FP8
        facts[f"FP8 {size}^3 TFLOP/s"] = f"FAILED {type(error).__name__}: {str(error)[:200]}"
    return facts


def _attention(device: str) -> dict[str, object]:
    """Time attention without a mask by every fused backend: 4 B H S^2 D FLOPs forward, 2.5 times as many backward."""
    backends, shape = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION), (4, 16, 4096, 128)
    if device == "cpu":
        backends, shape = (SDPBackend.FLASH_ATTENTION,), (1, 2, 64, 32)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    toward, flops = torch.randn_like(q), 4 * math.prod(shape) * shape[2]
    facts: dict[str, object] = {}
    for backend in backends:
        name = f"attention {backend.name.split('_')[0]} TFLOP/s"
        try:
            with sdpa_kernel(backend):
                ahead = milliseconds(lambda: scaled_dot_product_attention(q, k, v), device=device)
                both = milliseconds(lambda: scaled_dot_product_attention(q, k, v).backward(toward), device=device)
            facts[name] = f"forward {flops / ahead / 1e9:.0f}, with backward {3.5 * flops / both / 1e9:.0f}"
        except Exception as error:  # one backend may be missing
            facts[name] = f"FAILED {type(error).__name__}: {str(error)[:200]}"
    return facts


if __name__ == "__main__":
    run_command(main)
