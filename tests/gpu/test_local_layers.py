"""The local layers' fast parts on a GPU: fused attention, weight-gradient fusion, recomputation."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from tests.gpu import needs

pytestmark = needs.gpu


def _built(block, **kwargs):
    from tests.gpu import one_gpu

    return one_gpu.trainee({"plain": one_gpu.PLAIN, "gidd": one_gpu.GIDD}[block], **kwargs)


@cache
def _plain_curve(block):
    """Return losses and gradient norms of steps in which nothing is recomputed."""
    return _built(block).train(range(4))


@needs.only_on_a_gpu
def test_attention_without_a_mask_is_fused_and_equals_the_plain_product():
    """cuDNN's or flash attention: the plain product would form the scores."""
    from torch.profiler import ProfilerActivity, profile

    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, 4, 512, 128, generator=draw, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        out = F.scaled_dot_product_attention(q, k, v)
    used = {event.key for event in profiled.key_averages()}
    assert used & {"aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention"}, used
    plain = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = (plain[0] @ plain[1].transpose(-1, -2) / 128**0.5).softmax(-1) @ plain[2]
    toward = torch.randn(out.shape, generator=draw, device="cuda", dtype=torch.bfloat16)
    out.backward(toward)
    expected.backward(toward.double())
    for found, wanted in [(out, expected), *((x.grad, y.grad) for x, y in zip((q, k, v), plain, strict=True))]:
        assert ((found.double() - wanted).norm() / wanted.norm()).item() < 1e-2


@needs.only_on_a_gpu
def test_the_product_with_a_float32_output_adds_exactly():
    from megadiff.platform import matrix_products

    draw = torch.Generator("cuda").manual_seed(0)
    inputs = torch.randn(1024, 256, generator=draw, device="cuda").bfloat16()
    grad = torch.randn(1024, 384, generator=draw, device="cuda").bfloat16()
    main = torch.randn(384, 256, generator=draw, device="cuda")
    expected = main.double() + grad.double().t() @ inputs.double()
    assert matrix_products.kernel(torch.device("cuda"))[0] is not None
    matrix_products.accumulate_in_float32(inputs, grad, main)
    assert ((main.double() - expected).norm() / expected.norm()).item() < 1e-6


@needs.only_on_a_gpu
@pytest.mark.parametrize("block", ["plain", "gidd"])
def test_fusing_weight_gradients_rounds_less_and_changes_nothing_else(block):
    fused = _built(block, parallel={"gradient_accumulation_fusion": True})
    apart = _built(block, parallel={"gradient_accumulation_fusion": False})
    assert fused.chunks[0].config.gradient_accumulation_fusion
    for (loss, norm), (other_loss, other_norm) in zip(fused.train(range(5)), apart.train(range(5)), strict=True):
        assert loss == pytest.approx(other_loss, rel=2e-3)
        assert norm == pytest.approx(other_norm, rel=1e-2)


@needs.only_on_a_gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_fused_weight_gradients_reach_the_distributed_optimizer(overlap):
    cut = {"distributed_optimizer": True, "overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
    plain = _built("plain", parallel={"gradient_accumulation_fusion": True}).train(range(5))
    split = _built("plain", parallel={"gradient_accumulation_fusion": True, **cut}).train(range(5))
    for (loss, norm), (other_loss, other_norm) in zip(plain, split, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-4)
        assert other_norm == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("block", ["plain", "gidd"])
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute": "full"},
        {"recompute": "selective"},
        {"recompute": "selective", "recompute_modules": ["core_attn", "layernorm", "mlp"]},
    ],
)
def test_recomputing_changes_nothing(block, recompute):
    again = _built(block, parallel=recompute).train(range(4))
    for (loss, norm), (other_loss, other_norm) in zip(_plain_curve(block), again, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-3)
        assert other_norm == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("name", ["adamw", "laprop"])
def test_optimizers_lower_the_loss_on_the_gpu(name):
    curve = _built("plain", optimizer={"name": name}).train(range(12))
    assert curve[-1][0] < curve[0][0] - 0.05
