"""The machine of a run, detected once at startup, logged, and passed down; the clock of its work.

No code below this package detects the machine; it reads the `Platform` it was given. A `Stopwatch` adds up the time of
marked intervals of work without waiting for the device.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import time
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from megadiff.errors import PlatformError
from megadiff.platform import engine_on_meta, matrix_products, megatron_on_cpu, transformer_engine, without_compiler
from megadiff.platform.gpus import peak_of_device
from megadiff.platform.quiet import silence_libraries

LAUNCH_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"

Layers = Literal["local", "transformer_engine"]
"""Origin of the layers: megatron-core's own on torch kernels, or Transformer Engine's fused ones."""


def order_launches(*, tensor_ranks: int, environ: MutableMapping[str, str] | None = None) -> str | None:
    """Make kernels start in the order in which they were launched, if tensor-parallel overlap relies on that.

    megatron-core launches a communication before the matrix product that hides it; with several hardware queues the
    product may start first and occupy the whole chip (tensor_parallel/layers.py: "we rely on
    CUDA_DEVICE_MAX_CONNECTIONS=1"). The results would be the same, only slower. The driver reads the variable when the
    process first uses the device, so call this before `machine.detect`. A value that is already set is kept.

    Returns:
        A line for the log; None if there is nothing to report, with a single tensor rank or if it was 1 already.
    """
    environ = os.environ if environ is None else environ
    if tensor_ranks == 1:
        return None
    value = environ.get(LAUNCH_QUEUES)
    if value is None:
        environ[LAUNCH_QUEUES] = "1"
        return f"{LAUNCH_QUEUES} was not set and is 1 now: tensor-parallel communication overlaps with computation"
    if value != "1":
        return (
            f"{LAUNCH_QUEUES} is {value}: tensor-parallel communication may wait for the computation it should hide "
            "behind; unset it or set it to 1"
        )
    return None


@dataclass(frozen=True)
class Platform:
    """The machine and the fast libraries that are available on it."""

    kind: Literal["cpu", "cuda"]
    device: torch.device
    backend: Literal["gloo", "nccl"]
    """Backend of torch.distributed."""
    device_name: str
    peak_flops: float | None
    """Datasheet peak of one device in dense bf16 FLOP/s; None if there is no meaningful one."""
    has_transformer_engine: bool
    has_apex: bool
    layers: Layers = "local"
    """Origin of the layers of bf16 models on this machine."""
    layers_problem: str = ""
    """Reason why Transformer Engine's layers are not used, if they were wanted."""
    weight_gradients: str | None = None
    """Name of the fused weight-gradient kernel, which accumulates inside the matrix product; None if there is none."""
    weight_gradients_problem: str = "that needs a GPU"
    """Reason why there is no fused weight-gradient kernel."""

    @property
    def is_cpu(self) -> bool:
        """Whether ranks run on CPU over gloo."""
        return self.kind == "cpu"

    @property
    def has_values(self) -> bool:
        """Whether tensors here hold values; on the meta device of a dry run they have shapes and types alone."""
        return self.device.type != "meta"

    def describe(self) -> str:
        """Return one line for the log: device, backend and available libraries."""
        found = [
            name for name, has in (("Transformer Engine", self.has_transformer_engine), ("Apex", self.has_apex)) if has
        ]
        kernels = ", ".join(found) if found else "plain torch kernels (no Transformer Engine, no Apex)"
        layers = ""
        if not self.is_cpu:
            layers = "; layers: Transformer Engine's" if self.layers == "transformer_engine" else "; layers: local"
            layers += f" ({self.layers_problem})" if self.layers_problem else ""
        return f"{self.device_name} over {self.backend}, torch {torch.__version__}, {kernels}{layers}"

    def prepare_megatron(self) -> None:
        """Make megatron-core ready for this machine; to be called once, before any use of it."""
        silence_libraries()
        if self.is_cpu:
            without_compiler.release_optimizers()
            megatron_on_cpu.install()
        elif self.weight_gradients is not None:
            matrix_products.install()
        megatron_on_cpu.fix()

    @contextmanager
    def on_meta(self, *, layers: Layers = "local") -> Iterator[Platform]:
        """Give this platform with tensors that have shapes and types but no values and no memory, for a dry run.

        Args:
            layers: layers of bf16 models; Transformer Engine's need `engine_on_meta.install`.
        """
        meta = replace(self, device=torch.device("meta"), layers=layers)
        with megatron_on_cpu.on_meta():
            if layers == "local":
                yield meta
            else:
                with engine_on_meta.scope():
                    yield meta

    def default_device(self) -> AbstractContextManager[Any]:
        """Return a context for code that names no device; it does nothing but on the meta device."""
        return nullcontext() if self.has_values else self.device

    def scope(self) -> AbstractContextManager[None]:
        """Return a context for building megatron-core's optimizer and for its checkpoint calls; it does nothing on
        CUDA."""
        return megatron_on_cpu.scope() if self.is_cpu else nullcontext()

    def synchronize(self) -> None:
        """Wait until the device has finished all work submitted to it."""
        if not self.is_cpu:
            torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int:
        """Return the largest memory this rank has used: allocator peak on CUDA, peak resident set on CPU."""
        if self.is_cpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return torch.cuda.max_memory_allocated(self.device)

    def memory_bytes(self) -> int:
        """Return the total memory: of this rank's device on CUDA; on CPU of the machine, or the limit of its control
        group."""
        if self.is_cpu:
            return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), _control_group_bytes())
        return torch.cuda.get_device_properties(self.device).total_memory

    def local_devices(self) -> int:
        """Return the number of ranks this node has a device for: GPUs, or cores on CPU."""
        return len(os.sched_getaffinity(0)) if self.is_cpu else torch.cuda.device_count()


def detect(
    wanted: Literal["auto", "cpu", "cuda"] = "auto",
    *,
    layers: Literal["auto", "local", "transformer_engine"] = "local",
    setting: str = "platform={}",
) -> Platform:
    """Detect the machine.

    Args:
        setting: the way the user chooses a platform, with `{}` in place of its name, for messages.
        wanted: `auto` takes CUDA if torch finds a device; the other two are required.
        layers: `auto` takes Transformer Engine's on CUDA if they can be used; the other two are required.

    Raises:
        PlatformError: CUDA or Transformer Engine was required and is not available.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise PlatformError(
            f"`{setting.format('cuda')}`, but torch sees no CUDA device here; give `{setting.format('cpu')}`, or check "
            f"the driver and that torch is a CUDA build (this one is {torch.__version__})"
        )
    if wanted == "cpu" or not has_cuda:
        if layers == "transformer_engine":
            raise PlatformError(
                "kernels is `transformer_engine`, which needs a GPU, but the run is on CPU; set `transformer_impl=auto`"
            )
        return Platform("cpu", torch.device("cpu"), "gloo", f"CPU ({os.cpu_count()} cores)", None, False, False)
    return _cuda_platform(layers)


def _cuda_platform(layers: Literal["auto", "local", "transformer_engine"]) -> Platform:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise PlatformError(
            f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}; start at most that many "
            "ranks per node (torchrun --nproc-per-node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    name = torch.cuda.get_device_name(device)
    peak = peak_of_device(name)
    found = transformer_engine.find() if layers != "local" else transformer_engine.Found(None)
    if layers == "transformer_engine" and found.version is None:
        raise PlatformError(
            f"kernels is `transformer_engine`, but {found.problem}; install `transformer-engine[pytorch]>=2.9,<2.12` "
            "for this torch, or set `transformer_impl=auto`"
        )
    adds_up, problem = matrix_products.kernel(device)
    return Platform(
        "cuda",
        device,
        "nccl",
        name,
        peak,
        _importable("transformer_engine"),
        _is_nvidia_apex(),
        layers="local" if found.version is None else "transformer_engine",
        layers_problem=found.problem,
        weight_gradients=adds_up,
        weight_gradients_problem=problem,
    )


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _is_nvidia_apex() -> bool:
    return apex_project() == "nvidia"


def apex_project() -> Literal["nvidia", "other"] | None:
    """Return the origin of the installed package `apex`, without importing it; None if there is none.

    The PyPI project of that name is a different one: only NVIDIA's has `apex.optimizers`.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return "nvidia" if any((folder / "optimizers").is_dir() for folder in folders) else "other"


def _control_group_bytes() -> int:
    """Return the memory limit of the container; without a limit, a number larger than any machine's memory."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            return int(text)
    return 2**63


class Stopwatch(Protocol):
    """A clock that adds up the intervals between `start` and `stop`."""

    def start(self) -> None:
        """Begin an interval."""
        ...

    def stop(self) -> None:
        """End the interval."""
        ...

    def read(self) -> float:
        """Return the seconds of all finished intervals that no earlier reading has counted."""
        ...


def stopwatch(platform: Platform) -> Stopwatch:
    """Return the stopwatch for the platform: wall time on CPU ranks, time of the current stream on CUDA."""
    return WallStopwatch() if platform.is_cpu else EventStopwatch()


class WallStopwatch:
    """Wall time of the calling thread's work."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Begin an interval; one that was never stopped is dropped."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """End the interval."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def read(self) -> float:
        """Return the seconds since the last reading."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class EventStopwatch:
    """Time between events on the current CUDA stream, read once the device has passed them."""

    def __init__(self) -> None:
        self._free: list[Any] = []
        self._pending: list[tuple[Any, Any]] = []
        self._started: Any = None

    def start(self) -> None:
        """Begin an interval; one that was never stopped is dropped."""
        self._started = self._recorded()

    def stop(self) -> None:
        """End the interval."""
        if self._started is not None:
            self._pending.append((self._started, self._recorded()))
            self._started = None

    def read(self) -> float:
        """Return the seconds of the intervals that the device has finished; the others are left for a later reading."""
        milliseconds, waiting = 0.0, []
        for start, stop in self._pending:
            if stop.query():
                milliseconds += start.elapsed_time(stop)
                self._free += [start, stop]
            else:
                waiting.append((start, stop))
        self._pending = waiting
        return milliseconds / 1e3

    def _recorded(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
