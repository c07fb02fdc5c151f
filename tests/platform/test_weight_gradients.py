"""Weight gradients added up inside the matrix product, and the fallback where cuBLAS has none."""

from __future__ import annotations

import sys

import torch

from megadiff.platform import matrix_products
from tests.support.ranks import on_ranks


def test_what_torch_cannot_do_here_is_found_out_and_said():
    """On CPU the product with a float32 output does not exist; on a GPU tests/gpu holds it to exact sums."""
    kernel, problem = matrix_products.kernel(torch.device("cpu"))
    assert kernel is None
    assert problem.startswith("torch.addmm does not add bf16 products to a float32 tensor here (")
    assert len(problem) < 200


def test_in_one_dtype_the_product_is_added_in_place():
    draw = torch.Generator().manual_seed(0)
    inputs, grad, main = (torch.randn(*shape, generator=draw).double() for shape in ((9, 4), (9, 6), (6, 4)))
    expected = main + grad.t() @ inputs
    matrix_products.accumulate(inputs, grad, main)
    torch.testing.assert_close(main, expected, rtol=1e-13, atol=1e-13)


def _install():
    matrix_products.install()
    matrix_products.install()
    from megatron.core.tensor_parallel import layers

    found = sys.modules[matrix_products.NAME]
    return (
        layers._grad_accum_fusion_available,
        layers.fused_weight_gradient_mlp_cuda is found,  # type: ignore[attr-defined]
        found.wgrad_gemm_accum_fp32 is matrix_products.accumulate_in_float32,
        found.wgrad_gemm_accum_fp16 is matrix_products.accumulate,
    )


def test_megatron_finds_the_stand_in_although_it_has_looked_already():
    """In a forked rank: this process stays as it is."""
    assert on_ranks(1, _install)[0] == (True, True, True, True)
    assert matrix_products.NAME not in sys.modules
