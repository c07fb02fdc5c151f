"""Transformer Engine's Python code on the meta device, for a dry run: its compiled functions by shapes and types alone.

The layers' own autograd functions run, so what they save for the backward pass, and which FP8 copies they keep, is the
library's decision. Its pure-Python wheel is enough; a compiled part that is installed is not loaded. An H100 (compute
capability 9.0) is imagined: FP8 products there need both operands along their rows, so that quantised tensors have a
transposed copy. What each compiled function returns was read in the library's C++ sources, in `pytorch/csrc`:
`quantizer.cpp`, and in `extensions` `cast.cpp`, `normalization.cpp`, `gemm.cpp`, `apply_rope.cpp`.

It changes the process for good: torch's functions about a GPU give that of the imagined one.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import os
import sys
import types
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megadiff.errors import PlatformError
from megadiff.platform import megatron_on_cpu, transformer_engine

_COMPILED = "transformer_engine_torch"
_IS_CUDA: Any = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]  what a mode gets where it is read
_CAPABILITY = (9, 0)
_MULTIPROCESSORS = 132
"""An H100's or H200's number; the sizes of no tensor depend on it."""


def problem() -> str | None:
    """Return why Transformer Engine's layers cannot be built in this process, as the end of a sentence; None if they
    can.

    It imports nothing. megatron-core looks for the library when it is imported, so it must not have been before.
    """
    if _is_installed():
        return None
    spec = find_spec("transformer_engine")
    if spec is None or not any(Path(folder, "pytorch").is_dir() for folder in spec.submodule_search_locations or ()):
        return (
            "its Python package is not there (`pip install --no-deps --target engine transformer_engine==2.11.0`, and "
            "PYTHONPATH=engine for the dry run alone)"
        )
    try:
        found = version("transformer_engine")
    except PackageNotFoundError:
        return "it is installed without its metadata, which name its version"
    if not transformer_engine.is_supported(found):
        return f"version {found} is installed and {transformer_engine.SUPPORTED_VERSIONS} are supported"
    if "megatron.core" in sys.modules:
        return "megatron-core was imported before it in this process"
    return None


def is_needed() -> bool:
    """Return whether megatron-core cannot be imported without `install`: the library raises without its compiled part,
    which lies beside it or in its folder `wheel_lib`."""
    spec = find_spec("transformer_engine")
    if spec is None or _is_installed() or find_spec(_COMPILED) is not None:
        return False
    folders = [Path(folder, "wheel_lib") for folder in spec.submodule_search_locations or ()]
    return not any(list(folder.glob(f"{_COMPILED}*")) for folder in folders)


def _is_installed() -> bool:
    return isinstance(sys.modules.get(_COMPILED), _Module)


def install() -> None:
    """Make `import transformer_engine.pytorch` work on the meta device. It is safe to call this again.

    To be called before megatron-core is imported, and where `problem` finds none.
    """
    if _is_installed():
        return
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the package then looks for no shared library of its own
    importlib.import_module("torch._dynamo")  # it looks at onnx itself, before there is a substitute

    sys.modules[_COMPILED] = compiled = _Module(_COMPILED)
    for function in _FUNCTIONS:
        setattr(compiled, function.__name__, function)
    for name in ("layernorm_fwd", "layernorm_bwd"):  # named beside those of RMSNorm, and not called
        setattr(compiled, name, _Name(name))
    for name, kind in _ENUMERATIONS.items():
        setattr(compiled, name, kind)
    for name in ("onnx", "onnxscript", "onnxscript.onnx_opset", "einops"):  # only its exporters and debugger use them
        if name not in sys.modules and find_spec(name.partition(".")[0]) is None:
            sys.modules[name] = _Module(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that there is no shared library
        common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
    _imagine_a_gpu()


def _imagine_a_gpu() -> None:
    """Give the library what it would look up on a GPU."""
    properties = types.SimpleNamespace(
        major=_CAPABILITY[0], minor=_CAPABILITY[1], multi_processor_count=_MULTIPROCESSORS
    )
    torch.cuda.get_device_capability = lambda *_: _CAPABILITY
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device = torch.cuda.nvtx.range = lambda *_: nullcontext()  # type: ignore[assignment,misc]  2.9 calls them
    torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment]
    quantization: Any = importlib.import_module("transformer_engine.pytorch.quantization")
    for name in ("check_fp8_support", "check_fp8_block_scaling_support"):  # they look at the CUDA version of torch
        setattr(quantization, name, lambda: (True, ""))
    gemm: Any = importlib.import_module("transformer_engine.pytorch.cpp_extensions.gemm")
    gemm.get_cublas_workspace = lambda *_: torch.empty(0, dtype=torch.uint8, device="meta")
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    base.torch = _TorchWithCuda()
    norm: Any = importlib.import_module("transformer_engine.pytorch.ops.basic.rmsnorm")
    norm.RMSNorm.pre_first_fuser_forward = lambda self: None  # it moves a weight on the meta device to a GPU
    distributed: Any = importlib.import_module("transformer_engine.pytorch.distributed")
    for name, stand_in in (
        ("_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        ("_set_cuda_rng_state", lambda *_, **__: None),  # without values nothing is drawn
    ):
        setattr(distributed, name, stand_in)


@contextmanager
def scope() -> Iterator[None]:
    """Put on the meta device what Transformer Engine puts on a GPU, and let it take meta tensors for such a GPU's."""
    distributed: Any = torch.distributed
    coalescing, distributed._coalescing_manager = distributed._coalescing_manager, _each_on_its_own
    try:
        with megatron_on_cpu.scope(), _OnImaginedGpu(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "To guarantee overlapping")  # which concerns the order of kernels
            yield
    finally:
        distributed._coalescing_manager = coalescing


class _OnImaginedGpu(TorchFunctionMode):
    """A mode in which every tensor reports to be on a GPU, in the backward pass too.

    A mode is off while it handles a function, and `Tensor.backward` calls the layers' Python functions, so the backward
    pass is started here, inside new modes.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _IS_CUDA:
            return True
        if func in (torch.Tensor.backward, torch.autograd.backward):
            with megatron_on_cpu.scope(), _OnImaginedGpu():
                return _run_backward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _run_backward(tensors: Any, *, gradient: Any = None, grad_tensors: Any = None, **_: Any) -> None:
    """Run the backward pass, as `Tensor.backward` and `torch.autograd.backward` do if gradients are given."""
    from torch.autograd.graph import _engine_run_backward  # torch's own, so looked up only where it is used

    gradients = gradient if gradient is not None else grad_tensors
    _engine_run_backward(
        (tensors,) if isinstance(tensors, Tensor) else tuple(tensors),
        (gradients,) if isinstance(gradients, Tensor) else tuple(gradients),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


@contextmanager
def _each_on_its_own(*_: Any, **__: Any) -> Iterator[Any]:
    """Leave collectives that are started together as they are; the backends that group them know no meta device."""
    yield types.SimpleNamespace(wait=lambda: None)


def forget() -> None:
    """Forget the FP8 state of models that were built before, which the library keeps for the whole process."""
    quantization: Any = importlib.import_module("transformer_engine.pytorch.quantization")
    quantization.FP8GlobalStateManager.reset()


class _TorchWithCuda(types.ModuleType):
    """`torch` as Transformer Engine's modules see it: everything in it, and a GPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaThatIsThere()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class _CudaThatIsThere(types.ModuleType):
    """`torch.cuda` that answers that it can be used."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def is_available() -> bool:
        """Return True."""
        return True


def tensors_in(tensor: Any) -> list[Tensor]:
    """Return the tensors that hold the data of a tensor: of a quantised one its bytes, transposed bytes and scales."""
    metadata = getattr(tensor, "get_metadata", None)
    if metadata is None:
        return [tensor]
    return [part for part in metadata().values() if isinstance(part, Tensor)]


def quantised_weights(module: Any) -> list[Tensor]:
    """Return the tensors of the FP8 copies of weights that a module keeps from microbatch to microbatch."""
    return [part for copy in getattr(module, "_fp8_workspaces", {}).values() for part in tensors_in(copy)]


_DType: Any = enum.IntEnum(
    "DType",
    {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
)
"""Types of elements."""


class _Format(enum.IntEnum):
    """Layouts of the scales of blocks."""

    GEMM_READY = 0
    COMPACT = 1


def _numbered(name: str, *parts: str) -> Any:
    """Return the places of the quantizers of up to three matrices of a module."""
    return enum.IntEnum(name, [part.format(matrix) for matrix in (1, 2, 3) for part in parts], start=0)


_ENUMERATIONS: dict[str, Any] = {
    "DType": _DType,
    "Float8BlockScaleTensorFormat": _Format,
    "FP8FwdTensors": _numbered("FP8FwdTensors", "GEMM{}_INPUT", "GEMM{}_WEIGHT", "GEMM{}_OUTPUT"),
    "FP8BwdTensors": _numbered("FP8BwdTensors", "GRAD_OUTPUT{}", "GRAD_INPUT{}"),
}
_TORCH_TYPES = {_DType.kFloat32: torch.float32, _DType.kFloat16: torch.float16, _DType.kBFloat16: torch.bfloat16}


def _like(quantizer: Any, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Any:
    """Return an empty quantised tensor as a quantizer wants it: a tensor, or for internal use its parts alone."""
    made = quantizer.make_empty(list(shape), dtype=dtype, device=device)
    if not quantizer.internal:
        return made
    kind = next(base for base in type(made).__mro__[1:] if base.__name__.endswith("Storage"))
    return kind(**made.get_metadata())


def _matrix(tensor: Any) -> tuple[int, int]:
    """Return the rows and columns of an operand, from its bytes or else from its transposed ones."""
    if isinstance(tensor, Tensor):
        return tensor.numel() // tensor.shape[-1], tensor.shape[-1]
    rowwise, columnwise = tensor.get_data_tensors()
    if rowwise is not None:
        return _matrix(rowwise)
    return columnwise.numel() // columnwise.shape[0], columnwise.shape[0]


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    """Cast a tensor."""
    if output is not None:
        return output
    return _like(quantizer, tensor.shape, dtype=tensor.dtype, device=tensor.device)


def dequantize(tensor: Any, dtype: int) -> Tensor:
    """Cast back."""
    data, _ = tensor.get_data_tensors()
    return torch.empty(data.shape, dtype=_TORCH_TYPES[dtype], device=data.device)


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> list[Any]:
    """Sum a gradient over tokens and cast it."""
    return [gradient.new_empty(gradient.shape[-1]), quantize(gradient, quantizer)]


def fp8_transpose(data: Tensor, dtype: int, *, out: Tensor | None = None) -> Tensor:
    """Transpose the bytes of a quantised tensor."""
    return data.new_empty((data.shape[-1], *data.shape[:-1])) if out is None else out


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Transpose the first two dimensions."""
    return tensor.new_empty((tensor.shape[1], tensor.shape[0], *tensor.shape[2:])) if out is None else out


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, *_: Any) -> list[Any]:
    """Normalise [tokens, width]: the result, quantised if a quantizer is given, no mean, and 1 / rms of each token."""
    if out is None:
        out = torch.empty_like(x) if quantizer is None else quantize(x, quantizer)
    return [out, None, x.new_empty(x.shape[0], dtype=torch.float32)]


def rmsnorm_bwd(gradient: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, *_: Any) -> list[Tensor]:
    """Return the gradients of input and gain."""
    return [torch.empty_like(gradient), torch.empty_like(weight)]


def generic_gemm(*args: Any, **kwargs: Any) -> tuple[Any, Tensor | None, None, Any]:
    """Multiply: the product, and with `grad` the gradient of a bias.

    Operands are written as by cuBLAS: with flags `transa`, `transb` the product is B A^T, B A or B^T A. Axes before the
    last of B remain if B is not transposed.
    """
    a, transa, b, transb, out, quantizer, dtype, bias, _, _, _, grad = args[:12]
    device = tensors_in(b)[0].device
    (rows_a, columns_a), (rows_b, columns_b) = _matrix(a), _matrix(b)
    if (columns_a if transa else rows_a) != (rows_b if transb else columns_b):
        raise ValueError(f"a product of {rows_b, columns_b} and {rows_a, columns_a}, transposed: {transb}, {transa}")
    whole = b if isinstance(b, Tensor) else b.get_data_tensors()[0]
    kept = (columns_b,) if transb else (rows_b,) if whole is None else whole.shape[:-1]
    if out is None:
        shape, kind = (*kept, rows_a if transa else columns_a), _TORCH_TYPES[dtype]
        if quantizer is None:
            out = torch.empty(shape, dtype=kind, device=device)
        else:
            out = _like(quantizer, shape, dtype=kind, device=device)
    bias_gradient = None
    if grad and bias is not None:
        bias_gradient = torch.empty(columns_b, dtype=_TORCH_TYPES[dtype], device=device)
    return out, bias_gradient, None, kwargs.get("extra_output")


def fused_rope_forward(x: Tensor, *_: Any) -> Tensor:
    """Rotate queries or keys."""
    return x.new_empty(x.shape)


def fused_rope_backward(gradient: Tensor, *_: Any) -> Tensor:
    """Rotate a gradient back."""
    return gradient.new_empty(gradient.shape)


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """Look for the largest value."""


def fused_amax_and_scale_update_after_reduction(*_: Any) -> None:
    """Update the scales of `delayed`."""


def multi_tensor_adam(*_: Any) -> None:
    """Update weights and moments in place, which a probe of the optimizer's state waits for and does not look at."""


_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    quantize,
    dequantize,
    bgrad_quantize,
    fp8_transpose,
    swap_first_dims,
    rmsnorm_fwd,
    rmsnorm_bwd,
    generic_gemm,
    fused_rope_forward,
    fused_rope_backward,
    compute_amax,
    fused_amax_and_scale_update_after_reduction,
    multi_tensor_adam,
)


class _Name:
    """A substitute for anything else that a compiled module has: an attribute, a function, a base class, a number.

    It computes nothing, and refuses tensors.
    """

    __members__: dict[str, Any] = {}  # noqa: RUF012  an enumeration of the compiled part has members

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Name(f"{self._name}.{name}")
        setattr(self, name, found)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise PlatformError(
                f"a dry run does not know what Transformer Engine's compiled function {self._name} returns; set "
                "transformer_impl=local for it, or install one of the versions that it knows, "
                f"{transformer_engine.SUPPORTED_VERSIONS}"
            )
        is_decorator = len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType)
        return args[0] if is_decorator else _Name(f"{self._name}()")

    def __int__(self) -> int:
        return zlib.crc32(self._name.encode()) & 0x7FFFFFFF

    __index__ = __int__

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__


class _Module(types.ModuleType):
    """A module that has every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Name(name)
        setattr(self, name, found)
        return found
