"""Products of low-precision matrices added to a float32 one, which torch can do in one call where cuBLAS does."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: int = 1) -> None:
    """total = beta total + a @ b, in place: no rounding between, no extra pass over `total`.

    Args:
        total: [m, k] float32.
        a, b: [m, n] and [n, k] bf16 or fp16.
        beta: 0 overwrites whatever `total` held.
    """
    torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)


@cache
def problem_of(device: torch.device) -> str:
    """Why `add_product` cannot be used on a device; empty where it can.

    It is tried once on a tiny tensor, against numbers that bf16 holds exactly.
    """
    try:
        b = torch.arange(256, device=device).remainder(7).view(16, 16).bfloat16()
        a = torch.arange(256, device=device).remainder(5).view(16, 16).bfloat16().t()
        found = torch.full((16, 16), 0.001, device=device)
        expected = found.double() + a.double() @ b.double()
        add_product(found, a, b)
    except (RuntimeError, TypeError) as error:  # a kernel that does not exist, or a torch that knows no such argument
        said = str(error).split(". ")[0]
        return f"torch.addmm does not add bf16 products to a float32 tensor here ({said})"
    if not torch.allclose(found.double(), expected, rtol=1e-6, atol=0.0):
        return "torch.addmm with a float32 output gives wrong sums here"
    return ""
