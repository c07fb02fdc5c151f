"""TritonPasses under the interpreter (TRITON_INTERPRET=1): against TorchPasses pass by pass, and in the whole head."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megadiff.loss.fused_lm_head import LogitSums, MakePasses, TorchPasses, fused_objective
from megadiff.loss.lm_head import LossSpec, VocabShard, plain_objective
from megadiff.loss.triton_passes import TritonPasses
from tests.loss.head_cases import MASK, MIXES, ONLY_MASKS, TOKENS, VOCAB, asked, case
from tests.loss.test_fused_lm_head import close

STEP = 4096
"""Columns that a program takes at a time."""


class Rows(NamedTuple):
    """A chunk, and what its later passes are given."""

    logits: Tensor
    clean: Tensor
    noised: Tensor
    shard: VocabShard
    scale: Tensor
    slopes: tuple[Tensor, Tensor, Tensor, Tensor]


def rows(count: int, shard: VocabShard, dtype: torch.dtype, *, seed: int = 0) -> Rows:
    """Rows of every kind: z is x, the mask, another token; ids of this shard and of others; sharp and flat."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, shard.width, generator=g) * torch.logspace(-1, 2, count)[:, None]
    clean = torch.randint(shard.vocab_size - 1, (count,), generator=g)
    clean += clean >= shard.mask_id
    noised = torch.randint(shard.vocab_size, (count,), generator=g)
    noised[::3] = clean[::3]
    noised[1::6] = shard.mask_id
    return Rows(
        logits.to(dtype),
        clean,
        noised,
        shard,
        scale=torch.logspace(-9, 8, count)[torch.randperm(count, generator=g)],
        slopes=tuple(torch.randn(count, generator=g) for _ in range(4)),  # type: ignore[arg-type]
    )


def passed(make: MakePasses, question: Rows, *, is_masked: bool) -> tuple[LogitSums, list[Tensor], Tensor]:
    """All three passes' results, in the order in which the head calls them."""
    passes = make(question.logits.clone(), question.clean, question.noised, question.shard)
    slope, log1p_slope, clean_logit, noised_logit = question.slopes
    sums = passes.sums()
    shares = [] if is_masked else list(passes.log1p_sums(question.scale))
    grad = passes.gradient(question.scale, slope, None if is_masked else log1p_slope, clean_logit, noised_logit)
    return sums, shares, grad


def agree(question: Rows, *, is_masked: bool = False) -> tuple[LogitSums, list[Tensor], Tensor]:
    """What TritonPasses give, after comparing it with TorchPasses in float64: to 2e-6, or the dtype's rounding."""
    got = passed(TritonPasses, question, is_masked=is_masked)
    slopes = tuple(slope.double() for slope in question.slopes)
    double = question._replace(logits=question.logits.double(), scale=question.scale.double(), slopes=slopes)
    want = passed(TorchPasses, double, is_masked=is_masked)
    is_empty = question.shard.num_valid - (question.shard.mask_column is not None) == 0
    for name, mine, theirs in zip(LogitSums._fields, got[0], want[0], strict=True):
        if name == "max_logit" and is_empty:
            assert bool((mine == torch.finfo(torch.float32).min).all())
        else:
            torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=1e-30, msg=name)
    for mine, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=1e-30)
    assert got[2].dtype == question.logits.dtype
    rounding = 2e-6 if got[2].dtype == torch.float32 else 2**-7  # the interpreter cuts off where a GPU rounds
    positive = double._replace(slopes=tuple(slope.abs() for slope in slopes))
    size = passed(TorchPasses, positive, is_masked=is_masked)[2]  # of what is added up: terms may cancel
    distance = want[0].max_logit[:, None] - question.logits.double()
    allowed = (rounding + 2e-7 * distance.clamp(min=0)) * size  # e^x is off by a rounding of x
    assert bool(((got[2].double() - want[2]).abs() <= allowed + 1e-25).all())
    return got


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("start", "width", "vocab"),
    [
        (0, 260, 260),
        (0, STEP, STEP - 3),
        (0, STEP + 16, STEP + 9),
        (260, 260, 700),
        (512, 300, 600),
        (0, 2 * STEP + 1000, 2 * STEP + 999),
    ],
    ids=["less than a step", "a step", "into a second step", "later shard", "padded last shard", "odd width"],
)
def test_each_pass_equals_plain_torch(start, width, vocab, dtype, is_masked):
    shard = VocabShard(start, width, vocab, mask_id=7)
    _, _, grad = agree(rows(12, shard, dtype), is_masked=is_masked)
    assert float(grad[:, shard.num_valid :].abs().sum()) == 0
    if shard.mask_column is not None:
        assert float(grad[:, shard.mask_column].abs().sum()) == 0


@pytest.mark.parametrize("start", [0, 4])
def test_a_mask_in_the_middle_of_a_later_step(start):
    agree(rows(6, VocabShard(start, 2 * STEP, 2 * STEP + start, mask_id=STEP + 50), torch.float32))


def test_one_row():
    agree(rows(1, VocabShard(0, 64, 61, mask_id=5), torch.bfloat16))


def test_no_row():
    sums, shares, grad = agree(rows(0, VocabShard(0, 64, 61, mask_id=5), torch.bfloat16))
    assert [len(value) for value in (*sums, *shares, grad)] == [0] * 7


@pytest.mark.parametrize("mask_id", [9, 3], ids=["one", "the mask alone"])
def test_a_shard_with_one_real_column(mask_id):
    agree(rows(6, VocabShard(3, 1, 10, mask_id), torch.float32))


def test_a_shard_of_padding_alone_contributes_only_the_lowest_maximum():
    shard = VocabShard(64, 32, 61, mask_id=5)
    sums, shares, grad = passed(TritonPasses, rows(6, shard, torch.bfloat16), is_masked=False)
    assert sums.max_logit.tolist() == [torch.finfo(torch.float32).min] * 6
    assert all(float(value.abs().sum()) == 0 for value in (*sums[1:], *shares, grad))


def test_rows_may_lie_apart():
    question = rows(6, VocabShard(0, 300, 290, mask_id=7), torch.float32)
    wide = torch.full((6, 512), torch.nan)
    wide[:, :300] = question.logits
    want = passed(TritonPasses, question, is_masked=False)

    def on_part(logits, clean, noised, shard):
        return TritonPasses(wide[:, :300], clean, noised, shard)

    got = passed(on_part, question, is_masked=False)
    torch.testing.assert_close((*got[0], *got[1], got[2]), (*want[0], *want[1], want[2]), rtol=0, atol=0)
    assert got[2].data_ptr() == wide.data_ptr(), "in place"
    assert bool(wide[:, 300:].isnan().all()), "not beyond the row"


def test_logits_stay_as_they_are_until_the_gradient():
    question = rows(6, VocabShard(0, 300, 290, mask_id=7), torch.bfloat16)
    logits = question.logits.clone()
    passes = TritonPasses(logits, question.clean, question.noised, question.shard)
    passes.sums()
    passes.log1p_sums(question.scale)
    assert torch.equal(logits, question.logits)


def test_a_hundred_thousand_small_shares_lose_no_digits():
    """y of 1e-10: 1 + y is 1 in float32, and so is the product of any number of them; T and A must not be 0."""
    shard = VocabShard(0, 2**17, 2**17, mask_id=3)
    logits, ids = torch.zeros(1, 2**17), torch.tensor([5])
    passes = TritonPasses(logits, ids, ids, shard)
    passes.sums()
    log1p_sum, fraction_sum = passes.log1p_sums(torch.tensor([1e-10]))
    assert float(log1p_sum) == pytest.approx((2**17 - 2) * 1e-10, rel=1e-6)
    assert float(fraction_sum) == pytest.approx((2**17 - 2) * 1e-10, rel=1e-6)


@pytest.mark.parametrize("scale", [1e12, 1e30])
def test_where_y_is_held_what_is_lost_of_the_loss_is_below_its_rounding(scale):
    """T enters the loss as c T with c = alpha / rho, and the sum of y is rho (1 - p_x)."""
    shard = VocabShard(0, 4096, 4096, mask_id=3)
    logits = torch.randn(1, 4096, generator=torch.Generator().manual_seed(1)) * 3
    ids = torch.tensor([5])
    results = []
    for make, dtype in ((TritonPasses, torch.float32), (TorchPasses, torch.float64)):
        passes = make(logits.to(dtype, copy=True), ids, ids, shard)
        found = passes.sums()
        results.append((float(found.other) * scale, *passes.log1p_sums(torch.tensor([scale], dtype=dtype))))
    (_, log1p_sum, fraction_sum), (sum_of_y, want_log1p, want_share) = results
    assert abs(float(log1p_sum) - float(want_log1p)) <= 2.2e-8 * sum_of_y
    assert float(fraction_sum) == pytest.approx(float(want_share), rel=1e-6)


@pytest.mark.parametrize(
    ("mix", "dtype"),
    [*((mix, torch.float32) for mix in MIXES), *((mix, torch.bfloat16) for mix in ("shift 0", "masked time"))],
)
def test_the_head_on_these_passes_equals_the_plain_head(mix, dtype):
    """A noise sets the scales and slopes of the passes; `test_fused_lm_head` has bfloat16 with every noise."""
    question = case(mix, dtype)
    got = asked(fused_objective, mix, question, passes=TritonPasses, chunk_tokens=32)
    close(got, asked(plain_objective, mix, question), dtype)
    assert float(got[2][VOCAB:].abs().max()) == 0, "padding must get no gradient"
    assert float(got[2][MASK].abs().max()) == 0, "the mask must get no gradient"


@pytest.mark.parametrize("mix", ["shift 0", ONLY_MASKS[0]])
def test_the_head_without_gradients(mix):
    question = case(mix, torch.float32)
    want, _, _ = asked(plain_objective, mix, question)
    with torch.no_grad():
        got = fused_objective(*question, LossSpec(MIXES[mix]), passes=TritonPasses)
    torch.testing.assert_close(got.terms.loss, want.terms.loss, rtol=2e-5, atol=2e-5)
    assert got.terms.loss.shape == (TOKENS,)


@pytest.mark.parametrize(
    ("logits", "found"),
    [(torch.zeros(2, 8, dtype=torch.float64), "torch.float64"), (torch.zeros(8, 2).t(), r"strides \(1, 2\)")],
)
def test_logits_that_cannot_be_computed_on_are_refused(logits: Any, found):
    ids = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"float32, bfloat16 or float16 with contiguous rows, got .*{found}"):
        TritonPasses(logits, ids, ids, VocabShard(0, 8, 8, mask_id=3))
