"""Logits to a distribution: temperature, truncation, draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from megadiff.diffusion.mixing import HybridMixing
from megadiff.sampling.sampler import Prediction, draw_tokens, predict

MIXING = HybridMixing(5, 3, 0.0)
LOGITS = torch.tensor([[[1.2, -0.4, 0.3, 90.0, -1.1, 99.0]]])  # the mask and a padding column say nothing


def test_the_mask_and_padding_get_nothing():
    probs = predict(LOGITS, MIXING).probs
    assert probs.shape == (1, 1, 5)
    np.testing.assert_allclose(probs[0, 0], [0.5852316712, 0.1181562366, 0.2379374414, 0, 0.0586746507], rtol=1e-6)
    assert predict(LOGITS.bfloat16(), MIXING).probs.dtype == torch.float32
    assert LOGITS[0, 0, 3] == 90.0


def test_temperature_sharpens_and_zero_is_the_best_token():
    cold = predict(LOGITS, MIXING, temperature=0.5).probs
    torch.testing.assert_close(cold, predict(2 * LOGITS, MIXING).probs)
    assert predict(LOGITS, MIXING, temperature=0).probs.tolist() == [[[1, 0, 0, 0, 0]]]


def test_top_k_and_top_p_keep_the_head():
    assert (predict(LOGITS, MIXING, top_k=2).probs > 0).tolist() == [[[True, False, True, False, False]]]
    assert (predict(LOGITS, MIXING, top_p=0.5).probs > 0).tolist() == [[[True, False, False, False, False]]]
    assert (predict(LOGITS, MIXING, top_p=0.6).probs > 0).tolist() == [[[True, False, True, False, False]]]
    for options in ({"top_k": 2}, {"top_p": 0.7}, {"top_k": 100}, {"top_p": 1.0}):
        assert float(predict(LOGITS, MIXING, **options).probs.sum()) == pytest.approx(1, abs=1e-6)


def test_draws_follow_the_distribution_and_never_the_impossible():
    prediction = predict(LOGITS.expand(1, 20000, 6), MIXING, top_k=3)
    where = torch.ones(1, 20000, dtype=torch.bool)
    u = torch.rand(1, 20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = np.bincount(draw_tokens(prediction, where, u), minlength=5)
    want = prediction.probs[0, 0].numpy().astype(np.float64)
    assert (seen[want == 0] == 0).all()
    assert stats.chisquare(seen[want > 0], want[want > 0] / want.sum() * 20000).pvalue > 1e-3


def test_the_ends_of_the_unit_interval_give_possible_tokens():
    probs = torch.tensor([[[0.0, 0.3, 0.7, 0.0, 0.0]]])
    where = torch.ones(1, 1, dtype=torch.bool)
    for u, token in ((0.0, 1), (0.299999, 1), (0.300001, 2), (1 - 2**-53, 2)):
        assert draw_tokens(Prediction(probs), where, torch.tensor([[u]], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="temperature must be at least 0, top_k at least 1"):
        predict(LOGITS, MIXING, **options)


def test_too_few_logits_are_refused():
    with pytest.raises(ValueError, match="at least 5 logits"):
        predict(LOGITS[..., :4], MIXING)
