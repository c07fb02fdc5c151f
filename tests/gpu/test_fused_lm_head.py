"""The fused heads on a GPU: the plain head's values and gradients, memory of a chunk, and no word to the host."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from megadiff.loss.fused_lm_head import TorchPasses, fused_objective
from megadiff.loss.lm_head import LossInputs, LossOutput, LossSpec, VocabShard, plain_objective
from tests.gpu import needs
from tests.loss.head_cases import MIXES, TOKENS, Case, asked, case, close

pytestmark = needs.gpu
LARGE_VOCAB, MASK, WIDTH = 4096 if needs.DEVICE == "cpu" else 131072, 3, 512
KERNELS = [
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("triton") is None or needs.DEVICE == "cpu",
            reason="needs triton and a GPU; tests/loss has the kernels interpreted and compiled",
        ),
    ),
    "torch",
]


def passes_of(kernels):
    if kernels == "torch":
        return TorchPasses
    from megadiff.loss.triton_passes import TritonPasses

    return TritonPasses


def on_device(question: Case, dtype: torch.dtype | None = None) -> Case:
    tokens = question.tokens
    moved = LossInputs(tokens.clean.to(needs.DEVICE), tokens.noised.to(needs.DEVICE), tokens.log_snr.to(needs.DEVICE))
    return Case(question.hidden.to(needs.DEVICE, dtype), question.weight.to(needs.DEVICE, dtype), moved)


@pytest.fixture(autouse=True)
def _full_precision():
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = was


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
def test_every_branch_of_the_objective_equals_the_plain_head(mix, dtype, kernels):
    """In bf16 in one chunk: products of other shapes may round a logit to its neighbour, which shows in a loss."""
    question, chunk = on_device(case(mix, dtype)), TOKENS if dtype == torch.bfloat16 else 32
    got = asked(fused_objective, mix, question, passes=passes_of(kernels), chunk_tokens=chunk)
    close(got, asked(plain_objective, mix, question), dtype)


def large(mixing_name: str, dtype: torch.dtype, tokens: int = 96) -> tuple[Case, LossSpec]:
    from megadiff.diffusion.mixing import HybridMixing

    process = HybridMixing(LARGE_VOCAB, MASK, {"masked": -1000.0, "balanced": 0.0, "uniform": 1000.0}[mixing_name])
    g = torch.Generator(needs.DEVICE).manual_seed(4)
    hidden = torch.randn(tokens, WIDTH, generator=g, device=needs.DEVICE).to(dtype)
    weight = (torch.randn(LARGE_VOCAB, WIDTH, generator=g, device=needs.DEVICE) * 2 * WIDTH**-0.5).to(dtype)
    clean = torch.randint(MASK + 1, LARGE_VOCAB, (tokens,), generator=g, device=needs.DEVICE)
    noised = clean.clone()
    noised[::2] = clean.flip(0)[::2] if mixing_name == "uniform" else MASK
    noised[1::4] = clean.flip(0)[1::4] if mixing_name != "masked" else MASK
    log_snr = torch.linspace(-8, 8, tokens, device=needs.DEVICE)
    return Case(hidden, weight, LossInputs(clean, noised, log_snr)), LossSpec(process)


def answered(head, question: Case, spec: LossSpec, **kwargs) -> tuple[LossOutput, torch.Tensor, torch.Tensor]:
    hidden, weight = question.hidden.detach().requires_grad_(), question.weight.detach().requires_grad_()
    tokens = question.tokens
    if spec.process.is_masked_limit:
        tokens = replace(tokens, active_indices=(tokens.noised == MASK).nonzero().squeeze(-1))
    answer = head(hidden, weight, tokens, spec, **kwargs)
    answer.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return answer, hidden.grad, weight.grad


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["masked", "balanced", "uniform"])
def test_a_large_vocabulary_equals_the_plain_head_in_float64(name, dtype, kernels):
    """In bf16 the logits are rounded to it, as any head's are: the loss is off by that, the gradients by 2 %."""
    question, spec = large(name, dtype)
    double = question._replace(hidden=question.hidden.double(), weight=question.weight.double())
    want, want_hidden, want_weight = answered(plain_objective, double, spec)
    got, hidden, weight = answered(fused_objective, question, spec, passes=passes_of(kernels), chunk_tokens=40)
    allowed = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.terms.loss.double(), want.terms.loss, rtol=allowed, atol=allowed)
    share = 1e-4 if dtype == torch.float32 else 0.02
    for made, expected in ((hidden, want_hidden), (weight, want_weight)):
        assert float((made.double() - expected).norm()) <= share * float(expected.norm())


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_passes_of_vocabulary_slices_add_up_to_those_of_the_whole(kernels):
    """What ranks would all-reduce, on one device: width 32768, the mask on the first, each id on one of them."""
    question, _ = large("balanced", torch.bfloat16)
    logits, ids = question.hidden @ question.weight.t(), question.tokens
    parts, size = [], LARGE_VOCAB // 4
    for start in range(0, LARGE_VOCAB, size):
        shard = VocabShard(start, size, LARGE_VOCAB, MASK)
        part = logits[:, start : start + size].contiguous()
        parts.append(passes_of(kernels)(part, ids.clean, ids.noised, shard).sums())
    whole = passes_of(kernels)(logits, ids.clean, ids.noised, VocabShard(0, LARGE_VOCAB, LARGE_VOCAB, MASK)).sums()
    top = torch.stack([part.max_logit for part in parts]).amax(dim=0)
    assert torch.equal(top, whole.max_logit)
    other = torch.stack([part.other * torch.exp(part.max_logit - top) for part in parts]).sum(dim=0)
    torch.testing.assert_close(other, whole.other, rtol=1e-5, atol=0)
    for name in ("clean_logit", "noised_logit"):
        summed = torch.stack([getattr(part, name) for part in parts]).sum(dim=0)
        torch.testing.assert_close(summed, getattr(whole, name), rtol=0, atol=0)


@needs.only_on_a_gpu
@pytest.mark.parametrize(("kernels", "bytes_a_logit"), [(KERNELS[0].values[0], 2), ("torch", 14)])
def test_memory_grows_with_the_chunk_alone(kernels, bytes_a_logit):
    if kernels == "triton":
        pytest.importorskip("triton")
    peaks = []
    for tokens, chunk in ((1024, 128), (1024, 256), (2048, 256)):
        question, spec = large("balanced", torch.bfloat16, tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        answered(fused_objective, question, spec, passes=passes_of(kernels), chunk_tokens=chunk)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del question
    weight_gradient, chunk_bytes = 6 * LARGE_VOCAB * WIDTH, bytes_a_logit * 128 * LARGE_VOCAB
    assert peaks[1] - peaks[0] <= 1.2 * chunk_bytes + 2**22
    assert abs(peaks[2] - peaks[1]) <= 2**25, "twice the tokens, the same memory but for the states' gradient"
    assert peaks[0] <= weight_gradient + chunk_bytes * 1.2 + 2**26


@needs.only_on_a_gpu
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["masked", "balanced"])
def test_the_host_never_waits_for_the_device(name, kernels):
    question, spec = large(name, torch.bfloat16)
    tokens = question.tokens
    if name == "masked":
        tokens = replace(tokens, active_indices=(tokens.noised == MASK).nonzero().squeeze(-1))
    hidden, weight = question.hidden.requires_grad_(), question.weight.requires_grad_()
    make = passes_of(kernels)
    fused_objective(hidden, weight, tokens, spec, passes=make).loss.backward()  # compiled and allocated here
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_objective(hidden, weight, tokens, spec, passes=make, chunk_tokens=40).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
