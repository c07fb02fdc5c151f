"""Weight gradients added up inside the matrix product that makes them, without Apex.

With `gradient_accumulation_fusion` megatron-core's linear layers call Apex's `fused_weight_gradient_mlp_cuda`: one
matrix product that adds to the float32 gradient buffer, instead of a bf16 product, a cast and an addition. cuBLAS does
that through torch as well, by `addmm` with float32 output, so a module of Apex's name stands in for it. Transformer
Engine's own linear layers need neither, but the output head is megatron-core's.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor

NAME = "fused_weight_gradient_mlp_cuda"
"""The module megatron-core imports."""


def accumulate_in_float32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad += grad_output^T inputs, products in the inputs' precision, sums in float32.

    Args:
        inputs: [tokens, in] bf16 or fp16.
        grad_output: [tokens, out], of the same dtype.
        main_grad: [out, in] float32, changed in place.
    """
    torch.addmm(main_grad, grad_output.t(), inputs, out_dtype=torch.float32, out=main_grad)


def accumulate(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """The same where the gradient buffer has the inputs' dtype."""
    main_grad.addmm_(grad_output.t(), inputs)


def kernel(device: torch.device) -> tuple[str | None, str]:
    """(name of what would do it on `device`, "") or (None, why nothing would).

    Apex's extension is taken where it is installed; torch's product is tried once on a tiny tensor, against numbers
    that bf16 holds exactly.
    """
    if _apex_has_it():
        return "Apex", ""
    try:
        inputs = torch.arange(256, device=device).remainder(7).view(16, 16).bfloat16()
        grad_output = torch.arange(256, device=device).remainder(5).view(16, 16).bfloat16()
        found = torch.full((16, 16), 0.001, device=device)
        expected = found.double() + grad_output.double().t() @ inputs.double()
        accumulate_in_float32(inputs, grad_output, found)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        said = str(error).split(". ")[0]
        return None, f"torch.addmm does not add bf16 products to a float32 tensor here ({said})"
    if not torch.allclose(found.double(), expected, rtol=1e-6, atol=0.0):
        return None, "torch.addmm with a float32 output gives wrong sums here"
    return "torch addmm", ""


def install() -> None:
    """Put the stand-in where megatron-core looks for Apex's extension; leaves Apex's alone. Safe to call again.

    `tensor_parallel/layers.py:46` looks once, when it is imported, which has been by now; `utils.py:1123` at each use.

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
