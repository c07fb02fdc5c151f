"""Changes that make megatron-core run on CPU ranks over gloo; nothing here is called on CUDA.

The library's own options cover most of it (`use_cpu_initialization`, fusions off). The remaining sites are:

==================================================  ==========================================================
code in the library                                 change made here
==================================================  ==========================================================
`torch.cuda.current_device()` as `device=`          facade, once: returns `torch.device("cpu")`
(buffers, rotary embedding, P2P, mappings, ...)
streams, events, synchronize, empty_cache           facade, once: null objects and no-ops
`tensor_parallel/random.py` CUDA generator state    once: the CPU generator (the stock setter would queue a
                                                    closure per call forever, `torch.cuda._lazy_call`)
`pipeline_parallel/schedules.py:596,983,2138`       once: that module's `torch` becomes a forwarding namespace
`torch.zeros(..., device="cuda")` in the hot path   whose `zeros` maps the device
literal `device="cuda"`, `.cuda()`, pinned memory,  `scope()`: a `TorchFunctionMode` around optimizer
`Tensor.type() == "torch.cuda.FloatTensor"` in the  construction and checkpoints only: it costs 2 to 3
optimizer, dist_checkpointing                       microseconds per torch call, 25 % of a toy step (those of
                                                    clip_grads are avoided: `optim/optimizer.py`)
`parallel_state.create_group`: 27 groups a rank, of   once: groups of the same ranks are one group, because each
which many have the same ranks                      gloo group has threads of its own, and one of them wakes
                                                    a hundred times a second
`jit_fuser` = `torch.compile` on small functions    turned off as megatron is imported (`without_compiler`), or else
                                                    stance `force_eager`: Inductor would need a C++ compiler
==================================================  ==========================================================

`torch.cuda.is_available()` stays False and `device_count()` 0. Neither torch's factories nor `torch.Tensor` are
patched. `install` checks the library's version and that every patched attribute exists, so an upgrade fails loudly.
"""

from __future__ import annotations

import importlib
import logging
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megadiff.errors import PlatformError
from megadiff.platform import megatron_versions

_device = torch.device("cpu")
"""The device of what megatron-core puts on a GPU: the CPU, or the meta device inside `on_meta`."""
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


def fix() -> None:
    """Make `CheckpointWithoutOutput()` mean "without FP8", as its callers intend. It is safe to call this again.

    Its default is `fp8=False`, but it tests `fp8 is not None` (tensor_parallel/random.py:637), so every recomputed norm
    requests Transformer Engine's FP8 state, which is a NameError on a machine without that library. Norms that are
    separate modules never compute in FP8 here.
    """
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    if random.CheckpointWithoutOutput.__init__.__defaults__ == (False,):
        random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def install() -> None:
    """Make megatron-core usable in this CPU process. It is safe to call this again.

    Raises:
        PlatformError: megatron-core is missing, of another version, or lacks an attribute patched here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that TE, Apex and others are missing; the platform line shows that
        megatron_versions.check()
        random = importlib.import_module("megatron.core.tensor_parallel.random")
        schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
        state: Any = importlib.import_module("megatron.core.parallel_state")
    if importlib.import_module("megatron.core.jit").jit_fuser is torch.compile:  # imported before this package
        torch.compiler.set_stance("force_eager")
    for name, stand_in in _facade().items():
        _replace(torch.cuda, name, stand_in)
    _replace(random, "_get_cuda_rng_state", _get_rng_state)
    _replace(random, "_set_cuda_rng_state", _set_rng_state)
    _replace(schedules, "torch", _TorchWithCpuZeros())
    if not isinstance(state.create_group, _SharedGroups):
        _replace(state, "create_group", _SharedGroups(state.create_group))
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_drop_cpu_rng_notice)


@contextmanager
def scope() -> Iterator[None]:
    """Rewrite CUDA devices and type names to the CPU for the torch calls of this thread inside the block."""
    with _OnCpu():
        yield


@contextmanager
def on_meta() -> Iterator[None]:
    """Put what megatron-core puts on a GPU on the meta device inside the block.

    A recomputed norm of 0.19 compiles a C++ extension, to give a tensor the storage of another. Without values there is
    nothing to share, and a process that ends while it compiles leaves a lock for which the next one waits.
    """
    global _device
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    before, _device = _device, torch.device("meta")
    compiled = getattr(random, "_get_share_storage", None)
    if compiled is not None:
        random._get_share_storage = lambda: _share_nothing
    try:
        yield
    finally:
        _device = before
        if compiled is not None:
            random._get_share_storage = compiled


def _share_nothing(*_: Any) -> None:
    return None


def _replace(owner: Any, name: str, stand_in: Any) -> None:
    if not hasattr(owner, name):
        raise PlatformError(
            f"{owner.__name__} no longer has `{name}`, which megadiff/platform/megatron_on_cpu.py replaces on CPU; "
            f"install `{megatron_versions.REQUIREMENT}` with torch 2.10 or newer, or re-check that file"
        )
    setattr(owner, name, stand_in)


class _SharedGroups:
    """`parallel_state.create_group` which returns the group of the same ranks again while the default group is open.

    Every rank calls it with the same lists in the same order, members and others alike, so all ranks agree on which
    groups exist. Operations on a group keep the order in which the program starts them, whoever shares it.
    """

    def __init__(self, create: Callable[..., Any]) -> None:
        self._create = create
        self._world: Callable[[], Any] = lambda: None
        self._groups: dict[tuple[int, ...], Any] = {}

    def __call__(self, ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is None:
            return self._create(ranks, *args, **kwargs)
        if self._world() is not dist.group.WORLD:
            self._groups.clear()
            # Groups that were kept longer than the default group would keep their sockets open.
            self._world = weakref.ref(dist.group.WORLD, lambda _: self._groups.clear())
        key = tuple(ranks)
        if dist.get_backend() == "fake" and dist.get_rank() not in key:
            return dist.GroupMember.NON_GROUP_MEMBER  # of a thousand ranks' groups, a dry run needs its own rank's
        if key not in self._groups:
            self._groups[key] = self._create(ranks, *args, **kwargs)
        return self._groups[key]


class _NullStream:
    """A substitute for CUDA streams and events: all work of a CPU rank runs in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self


def _facade() -> dict[str, Any]:
    """Return the stand-ins by name; every name has a function of its own.

    torch.compile refuses a function that it finds under two names with different rules.
    """
    return {
        "current_device": lambda: _device,
        "set_device": lambda *args, **kwargs: None,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda *args, **kwargs: None,
        "Stream": _NullStream,
        "Event": type("_NullEvent", (_NullStream,), {}),
        "current_stream": lambda *args: _NullStream(),
        "default_stream": lambda *args: _NullStream(),
        "stream": lambda *args: nullcontext(),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *args, **kwargs: _get_rng_state(),
        "set_rng_state": lambda new_state, *args, **kwargs: _set_rng_state(new_state),
    }


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _drop_cpu_rng_notice(record: logging.LogRecord) -> bool:
    """Drop the warning that the CPU generator changed inside the CUDA context: here they are the same generator."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


class _TorchWithCpuZeros(types.ModuleType):
    """`torch` as megatron-core's schedules see it: everything in it, with `zeros` kept off CUDA."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        """Return `torch.zeros` with a CUDA device mapped to the CPU."""
        return torch.zeros(*args, **_without_cuda(kwargs))


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _without_cuda(kwargs: dict[str, Any]) -> dict[str, Any]:
    if _is_cuda(kwargs.get("device")):
        kwargs = {**kwargs, "device": _device}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    return kwargs


class _OnCpu(TorchFunctionMode):
    """A mode that maps device arguments to the CPU, makes `.cuda()` the identity, and returns CUDA's type names."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = _without_cuda(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to(_device)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _device, *args[2:])
        return func(*args, **kwargs)
