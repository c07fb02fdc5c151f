"""Matrix products accumulated in float32, whatever the factors' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from megadiff.platform import float32_products


def add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total (+)= a @ b, in place; the first product overwrites what `total` held.

    Args:
        total: [m, k], float32 or the factors' own dtype.
        a, b: [m, n] and [n, k] of one dtype.
    """
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if is_first else 1, out=total)
    elif total.is_cuda and not float32_products.problem_of(total.device):
        float32_products.add_product(total, a, b, beta=0 if is_first else 1)
    elif is_first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)
