"""Sequences of several documents through a whole model: each of them is computed as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megadiff.data.config import StepBatch
from megadiff.platform.quiet import quiet
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, MODERN_BLOCK, toy_config
from tests.support.toy_model import build_on_rank, model_config

with quiet():
    from megadiff.parallel.attention_pattern import AttentionPattern
    from megadiff.parallel.objective import ShardedObjective
    from megadiff.testing.methods import method_of

LENGTH = 16
SPANS = [[(0, 7), (7, 9), (9, 16)], [(0, 16)], [(0, 1), (1, 12), (12, 16)]]
DOCUMENTS = np.array([np.repeat(np.arange(len(row)), [end - start for start, end in row]) for row in SPANS])
YARN = {"type": "yarn", "factor": 4.0, "original_seq_length": 4}
LLAMA = {"type": "llama3", "factor": 8.0, "original_seq_length": 8}
MODELS = {
    "plain": {},
    "gidd, shifted": {**GIDD_BLOCK, "alignment": "shifted"},
    "modern, yarn": {**MODERN_BLOCK, "rope_scaling": YARN},
    "llama3": {"rope_scaling": LLAMA, "kv_heads": 2, "sink": True},
}


def _ids(seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(4, 260, (len(SPANS), LENGTH)))


def _model(settings):
    """Return a chunk whose attention is not nearly uniform."""
    head_init = 0.0 if settings.get("tie_embeddings") else 0.3
    return build_on_rank(model_config(**{**settings, "embed_init": 1.0, "init_scale": 3.0, "head_init": head_init}))


def _logits_together_and_alone(settings, is_causal):
    (chunk,), _ = _model(settings)
    ids = _ids()
    together = chunk(ids, AttentionPattern.within(torch.from_numpy(DOCUMENTS), is_causal=is_causal).codes())
    found = []
    for row, spans in enumerate(SPANS):
        for start, end in spans:
            own = AttentionPattern.causal(1, end - start).codes() if is_causal else None
            alone = chunk(ids[row : row + 1, start:end], own)
            found.append((together[start:end, row].detach().numpy(), alone[:, 0].detach().numpy()))
    return found, chunk(ids, None).detach().numpy()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_each_document_alone(name, is_causal):
    """Rotary positions go on through a sequence, and only differences of positions matter, whatever the scaling."""
    (pairs, full), *_ = on_ranks(1, _logits_together_and_alone, MODELS[name], is_causal)
    for together, alone in pairs:
        np.testing.assert_allclose(together, alone, rtol=2e-4, atol=2e-4)
    assert np.abs(pairs[0][0] - full[:7, 0]).max() > 1e-2  # attention to the others would be seen


def _of_the_first(settings, is_causal, others):
    """Return logits and gradients of the first document of each sequence, with other tokens in the others."""
    (chunk,), _ = _model(settings)
    is_first = torch.from_numpy(DOCUMENTS == 0)
    ids = torch.where(is_first, _ids(), _ids(others))
    logits = chunk(ids, AttentionPattern.within(torch.from_numpy(DOCUMENTS), is_causal=is_causal).codes())
    own = logits[is_first.t()]
    own.square().sum().backward()
    grads = [parameter.grad.numpy() for parameter in chunk.parameters() if parameter.grad is not None]
    return own.detach().numpy(), grads


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_leaks_from_one_document_to_another(name, is_causal):
    (one, gradients), (other, others) = (
        on_ranks(1, _of_the_first, MODELS[name], is_causal, seed)[0] for seed in (1, 2)
    )
    np.testing.assert_array_equal(one, other)
    assert len(gradients) > 10
    for a, b in zip(gradients, others, strict=True):
        np.testing.assert_array_equal(a, b)


def _losses(config):
    """Return the summed loss of packed documents with its gradients, and the same of each document by itself."""
    (chunk,), topology = _model({})
    method = method_of(config)
    objective = ShardedObjective(method, topology)
    predicted = np.random.default_rng(4).random((len(SPANS), LENGTH)) < 0.7
    predicted[1, 5:] = False
    whole = method.batch(_ids().numpy(), [0, 1, 2], StepBatch(0, 0, 3), predicted, DOCUMENTS)

    def loss_of(batch):
        placed = objective.place(batch, torch.device("cpu"))
        output = chunk(placed.sequences.noised, placed.attention.codes(), loss_fn=objective.loss_fn(placed))
        output.loss.backward()
        return float(output.loss), int(batch.is_noisy.sum())

    def gradients():
        found = [parameter.grad.clone().numpy() for parameter in chunk.parameters()]
        chunk.zero_grad()
        return found

    together = *loss_of(whole), gradients()
    alone = []
    for row, spans in enumerate(SPANS):
        for start, end in spans:
            cut = {name: column[row : row + 1] for name, column in whole._replace(documents=None).columns().items()}
            cut = {name: column[:, start:end] if column.dim() == 2 else column for name, column in cut.items()}
            alone.append(loss_of(whole._replace(documents=None, **cut)))
    return together, (*(sum(column) for column in zip(*alone, strict=True)), gradients())


@pytest.mark.parametrize(
    "settings",
    [{"noise__shift": "masked"}, {"noise__shift": "balanced"}, {"method__name": "next_token"}],
    ids=["masked", "balanced", "next token"],
)
def test_the_loss_is_the_sum_over_documents_alone(settings, toy_corpus, tmp_path):
    config = toy_config(toy_corpus, tmp_path, **settings)
    (together, alone), *_ = on_ranks(1, _losses, config)
    assert together[1] == alone[1] > 20
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    for one, other in zip(together[2], alone[2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())
