"""Products of low-precision matrices added to a float32 matrix, in a single torch call where cuBLAS supports it."""

from __future__ import annotations

from functools import cache

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
