"""The fused head equals the plain one, whole logits and the reference objective, in value and in both gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megadiff.diffusion.config import WEIGHTINGS, objective_config
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.objective import build_weighting
from megadiff.diffusion.processes.gidd_time import GiddTime, TimeSchedule
from megadiff.diffusion.schedules import UniformSchedule
from megadiff.errors import ConfigError
from megadiff.loss.fused_lm_head import TorchPasses, fused_objective
from megadiff.loss.lm_head import LossInputs, LossOutput, LossSpec, VocabShard, loss_token_indices, plain_objective
from tests.loss.head_cases import HIDDEN, MASK, MIXES, TOKENS, VOCAB, Case, asked, case, close
from tests.support.ranks import on_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mix", MIXES)
def test_one_process_equals_the_plain_head(mix, dtype, chunk):
    question = case(mix, dtype)
    got = asked(fused_objective, mix, question, chunk_tokens=chunk)
    close(got, asked(plain_objective, mix, question), dtype)
    assert float(got[2][VOCAB:].abs().max()) == 0, "padding must get no gradient"
    assert float(got[2][MASK].abs().max()) == 0, "the mask must get no gradient"


SHARDED = [
    *((mix, dtype, chunk) for mix in MIXES for dtype, chunk in zip(DTYPES, (7, 64, 7), strict=True)),
    *((mix, torch.float32, 1) for mix in ("shift 0", "masked time")),
]
"""Chunks of one token cost a collective each; two noises, with other entries and with masks alone, are enough of them
on ranks. One process has them all."""


def shard_answers(head: str, width: int) -> list[list[Any]]:
    """Loss, terms and this rank's gradients of each of SHARDED, as arrays (tensors do not outlive their rank)."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    found = []
    for mix, dtype, chunk in SHARDED:
        whole = case(mix, dtype, width)
        start = rank * (width // size)
        question = Case(whole.hidden, whole.weight[start : start + width // size], whole.tokens)
        shard = VocabShard.of(question.weight, MIXES[mix], start=start, group=torch.distributed.group.WORLD)
        more = {"chunk_tokens": chunk} if head == "fused" else {}
        ask = fused_objective if head == "fused" else plain_objective
        answer, hidden, weight = asked(ask, mix, question, shard=shard, **more)
        found.append([array(x) for x in (answer.loss, *answer.terms, hidden, weight)])
    return found


def array(value: torch.Tensor) -> Any:
    return value.double().numpy()


@pytest.mark.parametrize("head", ["fused", "plain"])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("width", [64, 128])
def test_a_vocabulary_cut_over_ranks_changes_neither_value_nor_gradient(head, ranks, width):
    """Width 64 pads the last rank, width 128 leaves whole ranks with nothing but padding."""
    by_rank = on_ranks(ranks, shard_answers, head, width)
    for index, (mix, dtype, _) in enumerate(SHARDED):
        answers = [results[index] for results in by_rank]
        for other in answers[1:]:
            assert all((a == b).all() for a, b in zip(answers[0][:7], other[:7], strict=True)), "ranks disagree"
        want = asked(plain_objective, mix, case(mix, dtype, width))
        loss, *terms = (torch.from_numpy(np.asarray(value)) for value in answers[0][:7])
        hidden = torch.from_numpy(sum(answer[7] for answer in answers))
        weight = torch.from_numpy(np.concatenate([answer[8] for answer in answers]))
        got = LossOutput(loss, type(want[0].terms)(*terms))
        expected = LossOutput(want[0].loss.double(), type(want[0].terms)(*(term.double() for term in want[0].terms)))
        close((got, hidden, weight), (expected, want[1].double(), want[2].double()), dtype)


@settings(max_examples=60, deadline=None)
@given(
    shift=st.sampled_from([-1000.0, -75.0, -2.0, 0.0, 2.0, 1000.0]) | st.floats(-30, 30),
    scale=st.floats(0.2, 1.0),
    size=st.floats(0.01, 60.0),
    log_snr=st.floats(-9, 9),
    seed=st.integers(0, 2**31),
)
def test_any_noise_any_level_any_sharpness(shift, scale, size, log_snr, seed):
    """Loss in float32 to 2e-5 nats of float64's, gradients to 1e-5 of the largest; in float64 to 1e-10."""
    spec = LossSpec(HybridMixing(VOCAB, MASK, shift, scale))
    drawn = case("shift 0", torch.float64, seed=seed)
    hidden = drawn.hidden / drawn.hidden.norm(dim=-1, keepdim=True) * size
    tokens = replace(drawn.tokens, log_snr=torch.full_like(drawn.tokens.log_snr, log_snr))
    if spec.process.is_uniform_limit:
        tokens = replace(tokens, noised=torch.where(tokens.noised == MASK, tokens.clean, tokens.noised))
    single = Case(hidden.float(), drawn.weight.float(), tokens)
    double = Case(single.hidden.double(), single.weight.double(), tokens)
    want = asked(plain_objective, "", double, spec=spec)
    got = asked(fused_objective, "", double, spec=spec, chunk_tokens=32)
    torch.testing.assert_close(got[0].terms.loss, want[0].terms.loss, rtol=1e-9, atol=1e-11)
    for made, expected in zip(got[1:], want[1:], strict=True):
        assert float((made - expected).abs().max()) <= 1e-9 * float(expected.abs().max()) + 1e-13
    low = asked(fused_objective, "", single, spec=spec, chunk_tokens=32)
    rounded = 2e-5 + 3e-6 * size  # the logits' own rounding reaches the loss as it is
    torch.testing.assert_close(low[0].terms.loss.double(), want[0].terms.loss, rtol=2e-5, atol=rounded)
    assert float(low[0].terms.loss.min()) >= -1e-12
    assert all(bool(torch.isfinite(part).all()) for part in low[1:])


def test_tokens_that_do_not_count_cost_nothing_and_get_no_gradient():
    needed = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
    for mix in MIXES:
        question = case(mix, torch.float64)
        got = asked(fused_objective, mix, question, needed=needed, chunk_tokens=9)
        everything = asked(plain_objective, mix, question)
        torch.testing.assert_close(got[0].terms.loss, everything[0].terms.loss * needed, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got[1], everything[1] * needed[:, None], rtol=1e-9, atol=1e-12)
        for term in got[0].terms:
            assert float(term[~needed].abs().sum()) == 0


@pytest.mark.parametrize("head", [fused_objective, plain_objective])
def test_a_batch_without_a_masked_token_gives_zero_and_zero_gradients(head):
    question = case("shift -1000", torch.float32)
    tokens = replace(question.tokens, noised=question.tokens.clean)
    answer, hidden, weight = asked(head, "shift -1000", question._replace(tokens=tokens))
    assert float(answer.loss) == 0
    assert all(float(part.abs().sum()) == 0 for part in (*answer.terms, hidden, weight))


@pytest.mark.parametrize("weighting", WEIGHTINGS.names())
@pytest.mark.parametrize("mix", ["time", "masked time", "shift 0"])
def test_every_weighting_is_optimised_as_in_the_reference(mix, weighting):
    if weighting == "dynamic" and "time" not in mix:
        pytest.skip("dynamic weights are those of gidd_time alone")
    process = MIXES[mix].with_schedule(TimeSchedule(GiddTime(0.3)))
    spec = LossSpec(process, build_weighting(objective_config(weighting=weighting)))
    question = case(mix, torch.float64)
    got = asked(fused_objective, mix, question, spec=spec, chunk_tokens=7)
    want = asked(plain_objective, mix, question, spec=spec)
    torch.testing.assert_close(got[0].loss, want[0].loss, rtol=1e-10, atol=1e-12)
    for made, expected in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-8, atol=1e-9)


def test_schedule_and_itakura_saito_weight_reach_their_terms():
    weighting = build_weighting(objective_config(itakura_saito_weight=0.3))
    spec = LossSpec(MIXES["shift 0"].with_schedule(UniformSchedule(-9, 9)), weighting)
    question = case("shift 0", torch.float64)
    got, want = (asked(head, "shift 0", question, spec=spec) for head in (fused_objective, plain_objective))
    for a, b in zip(got[0].terms, want[0].terms, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_a_weighting_that_the_noise_does_not_have_is_refused():
    question, dynamic = case("shift 0", torch.float32), build_weighting(objective_config(weighting="dynamic"))
    with pytest.raises(ConfigError, match=r"dynamic, which is defined by the process gidd_time alone .* is GiddSnr"):
        fused_objective(*question, LossSpec(MIXES["shift 0"], dynamic))


def test_leading_axes_in_any_order_are_kept():
    """Megatron's states come sequence first, and ids as transposed views."""
    question = case("shift 0", torch.float32)
    spec = LossSpec(MIXES["shift 0"])
    flat = fused_objective(*question, spec)
    ids = (part.reshape(10, 7).t().contiguous().t() for part in (question.tokens.clean, question.tokens.noised))
    tokens = LossInputs(*ids, question.tokens.log_snr.reshape(10, 7))
    shaped = fused_objective(question.hidden.reshape(10, 7, HIDDEN), question.weight, tokens, spec)
    for a, b in zip(flat.terms, shaped.terms, strict=True):
        assert b.shape == (10, 7)
        torch.testing.assert_close(a, b.reshape(-1), rtol=0, atol=0)


def test_without_gradients_none_are_made():
    question, spec = case("shift 0", torch.float32), LossSpec(MIXES["shift 0"])
    weight = question.weight.requires_grad_()
    with torch.no_grad(), Shapes() as seen:
        answer = fused_objective(question.hidden, weight, question.tokens, spec)
    assert not answer.loss.requires_grad
    assert (64, HIDDEN) not in seen.made, "no buffer of the weight's shape"


def test_a_weight_with_a_main_gradient_adds_to_it_in_float32():
    """megatron-core's wrapper: what stands in `main_grad` stays, and its hook is told not to add `grad`."""
    question, spec = case("shift 0", torch.bfloat16), LossSpec(MIXES["shift 0"])
    _, _, plain = asked(
        plain_objective, "shift 0", Case(question.hidden.float(), question.weight.float(), question.tokens)
    )
    weight = torch.nn.Parameter(question.weight)
    weight.main_grad = torch.full(weight.shape, 2.0)  # type: ignore[attr-defined]
    for _ in range(2):
        (1.7 * fused_objective(question.hidden, weight, question.tokens, spec).loss).backward()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    added = (weight.main_grad - 2.0) / 2  # type: ignore[attr-defined]
    assert float((added - plain).abs().max()) <= 1e-2 * float(plain.abs().max())


def test_gradients_can_be_asked_for_once():
    question, spec = case("shift 0", torch.float32), LossSpec(MIXES["shift 0"])
    loss = fused_objective(question.hidden.requires_grad_(), question.weight, question.tokens, spec).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be computed only once"):
        loss.backward()


def test_wrong_shapes_and_chunks_are_refused():
    ids, spec = torch.zeros(3, dtype=torch.int64), LossSpec(HybridMixing(5, 3, 0.0))
    tokens = LossInputs(ids, ids, torch.zeros(3))
    with pytest.raises(ValueError, match=r"hidden must have shape \(3, '\*'\), got \(4, 2\)"):
        fused_objective(torch.zeros(4, 2), torch.zeros(5, 2), tokens, spec)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1"):
        fused_objective(torch.zeros(3, 2), torch.zeros(5, 2), tokens, spec, chunk_tokens=0)


def test_only_tokens_that_can_have_a_loss_are_worth_computing():
    noised, is_noisy = torch.tensor([[5, 1], [5, 5]]), torch.tensor([[True, True], [False, True]])
    masked, hybrid = MIXES["shift -1000"], MIXES["shift 0"]
    found = [loss_token_indices(noised, is_noisy, process) for process in (masked, hybrid)]
    assert [None if places is None else places.tolist() for places in found] == [[0, 3], [0, 1, 3]]
    assert loss_token_indices(noised, torch.ones_like(is_noisy), hybrid) is None


class Shapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes, and the largest one's number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.made.add(tuple(value.shape))
        return result


@pytest.mark.parametrize("shift", [-1000.0, 0.0])
def test_memory_grows_with_the_chunk_and_not_with_the_logits(shift):
    """Beside states and weight and their gradients, no array is larger than a chunk's logits."""
    tokens, width, chunk = 512, 256, 16
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(width, 8, requires_grad=True)
    ids = torch.randint(4, width, (tokens,))
    process = HybridMixing(width, 3, shift)
    noised = torch.where(torch.rand(tokens) < 0.5, 3, ids)
    computed = loss_token_indices(noised, torch.ones(tokens, dtype=torch.bool), process)
    question = LossInputs(ids, noised, torch.zeros(tokens), computed)
    with Shapes() as seen:
        fused_objective(hidden, weight, question, LossSpec(process), chunk_tokens=chunk).loss.backward()
    assert max(np.prod(shape) for shape in seen.made) <= max(chunk * width, tokens * 8, width * 8)


@pytest.mark.parametrize(
    ("tokens", "at_most", "sizes"), [(300, 260, [256, 44]), (600, 500, [384, 216]), (70, 64, [64, 6]), (40, 1000, [40])]
)
def test_chunks_are_few_and_of_about_one_size(tokens, at_most, sizes):
    """Of whole multiples of 128 where there are enough: 600 in 384 and 216 rather than 500 and 100."""
    seen = []

    def passes(logits, *rest):
        seen.append(len(logits))
        return TorchPasses(logits, *rest)

    ids = torch.full((tokens,), MASK + 1)
    question = LossInputs(ids, ids, torch.zeros(tokens))
    spec = LossSpec(HybridMixing(VOCAB, MASK, 0.0))
    fused_objective(torch.randn(tokens, 4), torch.randn(VOCAB, 4), question, spec, passes=passes, chunk_tokens=at_most)
    assert seen == sizes
