"""The objective on vocabulary shards and chunks equals the reference on full logits, in value and gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.mixing_base import Mixing
from megadiff.diffusion.objective import Terms, gidd_objective
from megadiff.diffusion.snr import TimeRate, UniformRate
from megadiff.diffusion.time_mixing import TimeMixing
from megadiff.diffusion.time_process import TimeProcess
from megadiff.errors import ConfigError
from megadiff.parallel.vocab_objective import vocab_parallel_objective
from tests.support.ranks import on_ranks

VOCAB, MASK, TOKENS = 61, 5, 70
MIXES: dict[str, Mixing] = {
    **{f"shift {shift:g}": HybridMixing(VOCAB, MASK, shift) for shift in (-1000.0, -75.0, 0.0, 1000.0)},
    "time": TimeMixing(VOCAB, MASK, TimeProcess(0.3)),
    "masked time": TimeMixing(VOCAB, MASK, TimeProcess()),
}
ONLY_MASKS = ("shift -1000", "shift -75", "masked time")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def batch(mix: str, dtype: torch.dtype, width: int) -> tuple[torch.Tensor, ...]:
    """Logits [T, width] (columns from VOCAB on are padding), x, z, lambda, and an upstream gradient."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(TOKENS, width, generator=g, dtype=torch.float64) * 3
    logits[:, VOCAB:] = 40.0
    clean = torch.randint(VOCAB - 1, (TOKENS,), generator=g)
    clean += clean >= MASK
    logits[:5] *= 20
    logits[5:8].scatter_(1, clean[5:8, None], 400.0)  # certain and right
    other = torch.randint(VOCAB - 1, (TOKENS,), generator=g)
    other += other >= MASK
    kind = torch.rand(TOKENS, generator=g)
    noised = torch.where(kind < 0.3, clean, torch.where(kind < 0.6, MASK, other))
    if mix in ONLY_MASKS:
        noised = torch.where(kind < 0.4, clean, MASK)
    if mix == "shift 1000":
        noised = torch.where(noised == MASK, clean, noised)
    log_snr = torch.rand(TOKENS, generator=g, dtype=torch.float64) * 18 - 9
    return logits.to(dtype), clean, noised, log_snr, torch.rand(TOKENS, generator=g, dtype=torch.float64)


def reference(mix: str, dtype: torch.dtype, width: int, **kwargs: Any) -> tuple[Terms, torch.Tensor]:
    logits, clean, noised, log_snr, upstream = batch(mix, dtype, width)
    leaf = logits.requires_grad_()
    terms = gidd_objective(leaf, clean, noised, log_snr, mixing=MIXES[mix], **kwargs)
    ((terms.elbo if kwargs.get("weighting") == "elbo" else terms.loss) * upstream).sum().backward()
    assert leaf.grad is not None
    return Terms(*(t.detach() for t in terms)), leaf.grad


def sharded(mix: str, dtype: torch.dtype, width: int, **kwargs: Any) -> tuple[Terms, torch.Tensor]:
    """This rank's terms and gradient, for the columns the rank holds of `width`."""
    logits, clean, noised, log_snr, upstream = batch(mix, dtype, width)
    group, size, rank = None, 1, 0
    if torch.distributed.is_initialized():
        group, size, rank = (
            torch.distributed.group.WORLD,
            torch.distributed.get_world_size(),
            torch.distributed.get_rank(),
        )
    start = rank * (width // size)
    leaf = logits[:, start : start + width // size].clone().requires_grad_()
    terms = vocab_parallel_objective(
        leaf, clean, noised, log_snr, mixing=MIXES[mix], group=group, vocab_start=start, **kwargs
    )
    ((terms.elbo if kwargs.get("weighting") == "elbo" else terms.loss) * upstream).sum().backward()
    assert leaf.grad is not None
    return Terms(*(t.detach() for t in terms)), leaf.grad


def close(got: Terms, grad: torch.Tensor, want: Terms, want_grad: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for name in ("loss", "weight"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), msg=name, **tolerance)
    # 1 / p(lambda) is up to 8000, and rounding of about alpha * 1e-7 in the divergence grows with it
    torch.testing.assert_close(got.elbo, want.elbo, rtol=tolerance["rtol"], atol=max(tolerance["atol"] * 10, 1e-11))
    seen = want.weight > 0
    torch.testing.assert_close((got.weight * got.kl)[seen], (want.weight * want.kl)[seen], **tolerance)
    torch.testing.assert_close((got.weight * got.is_div)[seen], (want.weight * want.is_div)[seen], **tolerance)
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(grad, want_grad, **tolerance)


CASES = [
    (mix, dtype, chunk)
    for mix in MIXES
    for dtype, chunk in ((torch.float32, 1), (torch.float64, 7), (torch.bfloat16, 7), (torch.float32, 64))
]


def every_case(width: int) -> list[tuple[list[npt.NDArray[Any]], npt.NDArray[Any]]]:
    """Terms and gradient of each of CASES, as arrays (tensors do not outlive the rank that made them)."""
    results = []
    for mix, dtype, chunk in CASES:
        terms, grad = sharded(mix, dtype, width, chunk_tokens=chunk)
        results.append(([term.numpy() for term in terms], grad.double().numpy()))
    return results


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("width", [64, 128])
def test_shards_and_chunks_change_neither_value_nor_gradient(ranks, width):
    """Width 64 pads the last rank, width 128 leaves whole ranks with nothing but padding."""
    results = on_ranks(ranks, every_case, width)
    for (mix, dtype, _), by_rank in zip(CASES, zip(*results, strict=True), strict=True):
        terms, _ = by_rank[0]
        for others, _ in by_rank[1:]:
            assert all((a == b).all() for a, b in zip(terms, others, strict=True)), "ranks disagree"
        grad = torch.from_numpy(np.concatenate([part for _, part in by_rank], axis=1))
        want, want_grad = reference(mix, dtype, width)
        close(Terms(*map(torch.from_numpy, terms)), grad, want, want_grad.double(), dtype)
        assert float(grad[:, VOCAB:].abs().max()) == 0
        assert float(grad[:, MASK].abs().max()) == 0


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
def test_one_process_needs_no_group(mix, dtype, chunk):
    terms, grad = sharded(mix, dtype, 64, chunk_tokens=chunk)
    close(terms, grad, *reference(mix, dtype, 64), dtype)
    if dtype == torch.float64:
        assert float(grad.sum(-1).abs().max()) < 1e-12, "rows of the gradient must add up to 0"


@pytest.mark.parametrize("mix", MIXES)
def test_the_elbo_can_be_what_is_optimised(mix):
    terms, grad = sharded(mix, torch.float64, 64, weighting="elbo")
    want, want_grad = reference(mix, torch.float64, 64, weighting="elbo")
    torch.testing.assert_close(terms.elbo, want.elbo, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, want_grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("mix", ["time", "masked time"])
def test_dynamic_weights_are_optimised_as_in_the_reference(mix, chunk):
    kwargs: dict[str, Any] = {"rate": TimeRate(TimeProcess(0.3)), "weighting": "dynamic"}
    terms, grad = sharded(mix, torch.float64, 64, chunk_tokens=chunk, **kwargs)
    want, want_grad = reference(mix, torch.float64, 64, **kwargs)
    plain, _ = reference(mix, torch.float64, 64)
    close(terms, grad, want, want_grad, torch.float64)
    assert float((want.loss - plain.loss).abs().max()) > 0.1
    torch.testing.assert_close(want.weight, plain.weight, rtol=0, atol=0)


def test_a_weighting_that_is_not_is_refused():
    logits, clean, noised, log_snr, _ = batch("shift 0", torch.float32, 64)
    with pytest.raises(ConfigError, match="dynamic is defined by the time form alone"):
        vocab_parallel_objective(logits, clean, noised, log_snr, mixing=MIXES["shift 0"], weighting="dynamic")
    with pytest.raises(ValueError, match="weighting must be one of surrogate, elbo, dynamic, got 'none'"):
        vocab_parallel_objective(logits, clean, noised, log_snr, mixing=MIXES["shift 0"], weighting="none")  # type: ignore


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("mix", MIXES)
def test_tokens_that_do_not_count_cost_nothing_and_get_no_gradient(mix, overwrite):
    needed = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
    terms, grad = sharded(mix, torch.float64, 64, needed=needed, chunk_tokens=9, overwrite_logits=overwrite)
    want, want_grad = reference(mix, torch.float64, 64)
    torch.testing.assert_close(terms.loss, want.loss * needed, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, want_grad * needed[:, None], rtol=1e-9, atol=1e-12)
    for term in terms:
        assert float(term[~needed].abs().sum()) == 0


def test_a_batch_without_a_masked_token_gives_zero_and_finite_gradients():
    logits = torch.randn(6, 9, requires_grad=True)
    ids = torch.arange(6)
    mixing = HybridMixing(9, 8, -1000)
    terms = vocab_parallel_objective(logits, ids, ids, torch.zeros(6), mixing=mixing)
    assert all(float(term.detach().abs().sum()) == 0 for term in terms)
    terms.loss.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) == 0


def test_leading_axes_in_any_order_are_kept():
    """Megatron's logits come sequence first, and ids as transposed views."""
    logits, clean, noised, log_snr, _ = batch("shift 0", torch.float32, 64)
    mixing = HybridMixing(VOCAB, MASK, 0.0)
    flat = vocab_parallel_objective(logits, clean, noised, log_snr, mixing=mixing)
    rows = [part.reshape(10, 7).t().contiguous().t() for part in (clean, noised, log_snr)]
    shaped = vocab_parallel_objective(logits.reshape(10, 7, 64), *rows, mixing=mixing)
    for a, b in zip(flat, shaped, strict=True):
        assert b.shape == (10, 7)
        torch.testing.assert_close(a, b.reshape(-1), rtol=0, atol=0)


def test_only_the_optimised_term_carries_a_gradient():
    logits, clean, noised, log_snr, _ = batch("shift 0", torch.float32, 64)
    leaf = logits.requires_grad_()
    mixing = HybridMixing(VOCAB, MASK, 0.0)
    for weighting, optimised in (("surrogate", "loss"), ("elbo", "elbo")):
        terms = vocab_parallel_objective(leaf, clean, noised, log_snr, mixing=mixing, weighting=weighting)  # type: ignore
        assert {name for name, term in terms._asdict().items() if term.requires_grad} == {optimised}


def test_overwriting_writes_the_gradient_into_the_logits():
    logits, clean, noised, log_snr, _ = batch("shift 0", torch.float32, 64)
    leaf = logits.clone().requires_grad_()
    made = leaf * 1.0
    terms = vocab_parallel_objective(
        made, clean, noised, log_snr, mixing=HybridMixing(VOCAB, MASK, 0.0), overwrite_logits=True, chunk_tokens=9
    )
    terms.loss.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(made.detach(), leaf.grad, rtol=0, atol=0)


def test_rate_and_is_weight_reach_their_terms():
    logits, clean, noised, log_snr, _ = batch("shift 0", torch.float64, 64)
    kwargs: dict[str, Any] = {"mixing": HybridMixing(VOCAB, MASK, 0.0), "rate": UniformRate(-9, 9), "is_weight": 0.3}
    got = vocab_parallel_objective(logits, clean, noised, log_snr, **kwargs)
    want = gidd_objective(logits, clean, noised, log_snr, **kwargs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_wrong_shapes_and_chunks_are_refused():
    ids, mixing = torch.zeros(3, dtype=torch.int64), HybridMixing(5, 3, 0.0)
    with pytest.raises(ValueError, match="logits must have shape"):
        vocab_parallel_objective(torch.zeros(4, 5), ids, ids, torch.zeros(3), mixing=mixing)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1"):
        vocab_parallel_objective(torch.zeros(3, 5), ids, ids, torch.zeros(3), mixing=mixing, chunk_tokens=0)


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage any operation returns, and how many were as large as the logits."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large, self.storages = large, set()
        self.largest_below = 0
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                count = value.untyped_storage().nbytes() // value.element_size()
                if count >= self.large:
                    self.kept.append(value)  # keeps the address from being used again
                    self.storages.add(value.untyped_storage().data_ptr())
                else:
                    self.largest_below = max(self.largest_below, count)
        return result


@pytest.mark.parametrize(("overwrite", "copies"), [(False, 1), (True, 0)])
def test_memory_grows_with_the_chunk_and_not_with_the_logits(overwrite, copies):
    """Of the logits' size there is one array, their gradient, or none; all others are a chunk's."""
    tokens, width, chunk = 512, 256, 16
    logits = torch.randn(tokens, width)
    ids = torch.randint(4, width, (tokens,))
    made = logits.requires_grad_() * 1.0
    with LargestTensor(tokens * width) as seen:
        terms = vocab_parallel_objective(
            made,
            ids,
            ids.roll(1),
            torch.zeros(tokens),
            mixing=HybridMixing(width, 3, 0.0),
            chunk_tokens=chunk,
            overwrite_logits=overwrite,
        )
        torch.autograd.grad(terms.loss.sum(), made)
    assert len(seen.storages - {made.untyped_storage().data_ptr()}) == copies
    assert seen.largest_below <= chunk * width
