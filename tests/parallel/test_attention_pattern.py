"""Attention patterns: their codes, and their number of pairs against an explicit mask."""

from __future__ import annotations

import pytest
import torch

from megadiff.parallel.attention_pattern import AttentionPattern

LENGTH = 7


def mask(prefix: int, *, is_causal: bool) -> torch.Tensor:
    """Return which of LENGTH keys each of LENGTH queries sees, by the definition."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    for query in range(prefix):
        seen[query, (query + 1) if is_causal else prefix :] = False
    return seen


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("prefixes", [(0,), (7,), (1, 0, 7, 4)])
def test_pairs_are_those_of_the_mask(prefixes, is_causal):
    pattern = AttentionPattern.prefix(torch.tensor(prefixes), is_causal=is_causal)
    assert pattern.pairs(LENGTH) == sum(int(mask(prefix, is_causal=is_causal).sum()) for prefix in prefixes)


def test_full_and_causal_attention_are_the_two_ends():
    assert AttentionPattern.full(3).codes() is None
    assert AttentionPattern.full(3).pairs(LENGTH) == 3 * LENGTH**2
    assert AttentionPattern.causal(2, LENGTH).codes().tolist() == [-LENGTH, -LENGTH]
    assert AttentionPattern.causal(2, LENGTH).pairs(LENGTH) == 2 * LENGTH * (LENGTH + 1) // 2


def test_codes_hold_prefixes_and_their_kind():
    lengths = torch.tensor([0, 3])
    assert AttentionPattern.prefix(lengths).codes().tolist() == [0, 3]
    assert AttentionPattern.prefix(lengths, is_causal=True).codes().tolist() == [0, -3]


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * LENGTH, [0, 1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("is_causal", [False, True])
def test_documents_are_kept_apart(is_causal):
    pattern = AttentionPattern.within(DOCUMENTS, is_causal=is_causal)
    seen = DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]
    if is_causal:
        seen = seen.tril()
    assert pattern.pairs(LENGTH) == int(seen.sum())
    sign = -1 if is_causal else 1
    wanted = [[3, 2, 2, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0], [1] * 7]
    assert pattern.codes().tolist() == [[sign * length for length in row] for row in wanted]
    assert torch.equal(AttentionPattern.within(2 * DOCUMENTS + 5, is_causal=is_causal).codes(), pattern.codes())


def test_single_documents_have_the_codes_of_whole_sequences():
    one = torch.full((2, LENGTH), 4)
    assert AttentionPattern.within(one).codes() is None
    assert AttentionPattern.within(one, is_causal=True).codes().tolist() == [-LENGTH, -LENGTH]
