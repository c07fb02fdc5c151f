"""Products of low-precision matrices added to a float32 matrix, also as weight gradients, without Apex.

With `gradient_accumulation_fusion` megatron-core's linear layers call Apex's `fused_weight_gradient_mlp_cuda`: one
matrix product that adds to the float32 gradient buffer, instead of a bf16 product, a cast and an addition. cuBLAS can
do that through torch as well, by `addmm` with float32 output, so a module of the same name replaces Apex's.
Transformer Engine's own linear layers need neither, but the output head is megatron-core's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache
from typing import Any

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: int = 1) -> None:
    """total = beta total + a @ b, in place: without intermediate rounding, and without an extra pass over `total`.

    Args:
        total: [m, k] float32.
        a, b: [m, n] and [n, k] bf16 or fp16.
        beta: 0 overwrites whatever `total` held.
    """
    torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)


@cache
def problem_of(device: torch.device) -> str:
    """Return why `add_product` cannot be used on a device, or "" if it can.

    It is tried once on a tiny tensor, with numbers that bf16 represents exactly.
    """
    try:
        b = torch.arange(256, device=device).remainder(7).view(16, 16).bfloat16()
        a = torch.arange(256, device=device).remainder(5).view(16, 16).bfloat16().t()
        found = torch.full((16, 16), 0.001, device=device)
        expected = found.double() + a.double() @ b.double()
        add_product(found, a, b)
    except (RuntimeError, TypeError) as error:  # no such kernel, or a torch without this argument
        reason = str(error).split(". ")[0]
        return f"torch.addmm does not add bf16 products to a float32 tensor here ({reason})"
    if not torch.allclose(found.double(), expected, rtol=1e-6, atol=0.0):
        return "torch.addmm with a float32 output gives wrong sums here"
    return ""


NAME = "fused_weight_gradient_mlp_cuda"
"""Name of the module that megatron-core imports."""


def accumulate_in_float32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad += grad_output^T inputs, with products in the inputs' precision and sums in float32.

    Args:
        inputs: [tokens, in] bf16 or fp16.
        grad_output: [tokens, out], of the same dtype.
        main_grad: [out, in] float32, changed in place.
    """
    add_product(main_grad, grad_output.t(), inputs)


def accumulate(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add the weight gradient to a buffer of the inputs' dtype."""
    main_grad.addmm_(grad_output.t(), inputs)


def kernel(device: torch.device) -> tuple[str | None, str]:
    """Return (name of the fused kernel on `device`, ""), or (None, the reason why there is none).

    Apex's extension is preferred if it is installed, then torch's product if it works.
    """
    if _apex_has_it():
        return "Apex", ""
    problem = problem_of(device)
    return (None, problem) if problem else ("torch addmm", "")


def install() -> None:
    """Put the replacement where megatron-core looks for Apex's extension, unless Apex is installed.

    It is safe to call this again. `tensor_parallel/layers.py:46` looks once, when it is imported, which has happened
    already; `utils.py:1123` looks at each use.

    Raises:
        AttributeError: megatron-core no longer has the names replaced here.
    """
    if _apex_has_it():
        return
    stand_in: Any = types.ModuleType(NAME)
    stand_in.wgrad_gemm_accum_fp32 = accumulate_in_float32
    stand_in.wgrad_gemm_accum_fp16 = accumulate
    sys.modules[NAME] = stand_in
    layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
    if not hasattr(layers, "_grad_accum_fusion_available"):
        raise AttributeError("megatron.core.tensor_parallel.layers has no _grad_accum_fusion_available")
    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = stand_in


def _apex_has_it() -> bool:
    known = sys.modules.get(NAME)
    if known is not None:
        return getattr(known, "wgrad_gemm_accum_fp32", None) is not accumulate_in_float32
    return importlib.util.find_spec(NAME) is not None
