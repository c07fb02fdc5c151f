"""Attention against a dense float64 softmax written here, with every option."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from megadiff.platform.quiet import quiet

with quiet():
    from megadiff.model import attention
    from megadiff.model.attention import BidirectionalAttention, capped_attention
    from megadiff.parallel.attention_pattern import AttentionPattern

S, B, H, D = 7, 3, 2, 4


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seen_by(prompt, is_causal):
    """[S, S + 1] bool: which keys each query sees; key 0 is the sink."""
    seen = torch.ones(S, S + 1, dtype=torch.bool)
    seen[:prompt, prompt + 1 :] = False
    if is_causal:
        seen[:prompt, 1:] &= torch.ones(S, S, dtype=torch.bool).tril()[:prompt]
    return seen


def dense(q, k, v, *, softcap=None, sink=None, prompts=(0,) * B, is_causal=False, documents=None):
    """softmax(cap(q.k / sqrt D)) v for [S, B, H, D], the sink merged as out = (e^lse o + e^s v_b) / (e^lse + e^s).

    Head h of queries meets head h // (H / G) of G heads of keys and values.
    """
    together = H // k.shape[2]

    def cap(scores):
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    out = torch.empty(S, B, H, D, dtype=torch.float64)
    for b, prompt in enumerate(prompts):
        seen = seen_by(prompt, is_causal)[:, 1:]
        if documents is not None:
            seen = documents[b][:, None] == documents[b]
            seen = seen.tril() if is_causal else seen
        for h in range(H):
            scores = cap(q[:, b, h] @ k[:, b, h // together].T / math.sqrt(D)).masked_fill(~seen, -math.inf)
            lse = scores.logsumexp(-1, keepdim=True)
            plain = (scores - lse).exp() @ v[:, b, h // together]
            if sink is not None:
                key, value = sink
                weight = cap(q[:, b, h] @ key[h] / math.sqrt(D)).exp().unsqueeze(-1)
                plain = (lse.exp() * plain + weight * value[h]) / (lse.exp() + weight)
            out[:, b, h] = plain
    return out.reshape(S, B, H * D)


def module(softcap, sink, groups=H):
    config = SimpleNamespace(
        num_attention_heads=H,
        num_query_groups=groups,
        tensor_model_parallel_size=1,
        kv_channels=D,
        params_dtype=torch.float64,
    )
    built = BidirectionalAttention(config, 1, sink=sink, softcap=softcap)
    if sink:
        built.sink_key.data, built.sink_value.data = drawn(H, D, seed=8), drawn(H, D, seed=9)
    return built


@pytest.mark.parametrize("groups", [H, 1])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("prompts", "is_causal"),
    [
        ((0, 0, 0), False),
        ((3, 0, 5), False),
        ((3, 0, 5), True),
        ((4, 4, 4), True),
        ((S, S, S), True),
        ((S, 1, 0), False),
    ],
)
def test_attention_is_the_dense_softmax(groups, sink, softcap, prompts, is_causal):
    q, k, v = (3 * drawn(S, B, heads, D, seed=i) for i, heads in enumerate((H, groups, groups)))
    built = module(softcap, sink, groups)
    codes = AttentionPattern.prefix(torch.tensor(prompts), is_causal=is_causal).codes()
    values = (built.sink_key.detach(), built.sink_value.detach()) if sink else None
    wanted = dense(q, k, v, softcap=softcap, sink=values, prompts=prompts, is_causal=is_causal)
    torch.testing.assert_close(built(q, k, v, codes).detach(), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", [H, 1])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("is_causal", [False, True])
def test_documents_attend_to_themselves_alone(groups, sink, softcap, is_causal):
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * S, [0, 1, 1, 1, 1, 1, 2]])
    leaves = [(3 * drawn(S, B, heads, D, seed=i)).requires_grad_() for i, heads in enumerate((H, groups, groups))]
    built = module(softcap, sink, groups)
    codes = AttentionPattern.within(documents, is_causal=is_causal).codes()
    values = (built.sink_key, built.sink_value) if sink else None
    leaves += values or []
    found = built(*leaves[:3], codes)
    wanted = dense(*leaves[:3], softcap=softcap, sink=values, is_causal=is_causal, documents=documents)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weights = drawn(S, B, H * D, seed=7)
    for one, other in zip(*(torch.autograd.grad((x * weights).sum(), leaves) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_sequence_without_a_prompt_needs_no_code():
    assert AttentionPattern.prefix(torch.zeros(4, dtype=torch.int64), is_causal=True).codes() is None


def test_a_fresh_sink_adds_one_to_every_denominator():
    """Zero key and value: out = e^lse o / (e^lse + 1)."""
    q, k, v = (drawn(S, B, H, D, seed=i) for i in range(3))
    built = module(None, sink=True)
    built.sink_key.data.zero_()
    built.sink_value.data.zero_()
    lse = torch.einsum("sbhd,tbhd->sbht", q, k).div(math.sqrt(D)).logsumexp(-1, keepdim=True)
    shrunk = (dense(q, k, v).view(S, B, H, D) * lse.exp() / (lse.exp() + 1)).reshape(S, B, H * D)
    torch.testing.assert_close(built(q, k, v).detach(), shrunk, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sequences", [1, 3, 7])
def test_chunks_of_queries_change_neither_values_nor_gradients(monkeypatch, sequences, is_causal):
    def run():
        q, k, v = (drawn(B, H, S if i == 0 else S + 1, D, seed=i).requires_grad_() for i in range(3))
        out = capped_attention(q, k, v, scale=0.5, softcap=2.0, is_causal=is_causal)
        out.backward(drawn(B, H, S, D, seed=5))
        return out.detach(), q.grad, k.grad, v.grad

    whole = run()
    monkeypatch.setattr(attention, "SCORE_BYTES", sequences * 4 * B * H * (S + 1))
    for chunked, unchunked in zip(run(), whole, strict=True):
        torch.testing.assert_close(chunked, unchunked, rtol=1e-12, atol=1e-13)


def test_a_wide_cap_is_no_cap():
    q, k, v = (drawn(S, B, H, D, seed=i) for i in range(3))
    torch.testing.assert_close(module(1e6, False)(q, k, v), module(None, False)(q, k, v), rtol=1e-9, atol=1e-10)


def test_bf16_scores_are_capped_and_summed_in_float32():
    q, k, v = (drawn(B, H, S, D, seed=i, dtype=torch.bfloat16) for i in range(3))
    found = capped_attention(q, k, v, scale=0.5, softcap=30.0)
    wanted = capped_attention(*(x.double() for x in (q, k, v)), scale=0.5, softcap=30.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=1e-2)
