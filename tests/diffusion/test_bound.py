"""What the objective must add up to: integrals over levels and noise that are known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.objective import LOG_RHO_LIMIT, VocabularySums, gidd_objective, terms_from_sums
from megadiff.diffusion.schedules import SCHEDULES
from tests.diffusion.dense import LOGITS, Z_LINEAR, bounds, f64, gauss, integral, over_z

GOLDEN = bounds()
ONE = f64(0.5, 0.3, 0.2)


def with_mask(log_p: torch.Tensor) -> torch.Tensor:
    """Log probabilities over three real tokens as logits of V = 4, mask 3."""
    return torch.cat([log_p, torch.zeros_like(log_p[..., :1])], dim=-1)


@pytest.mark.parametrize(("b", "exact", "estimator", "loss"), GOLDEN["constant_prediction"]["rows"])
def test_a_constant_prediction_telescopes(b, exact, estimator, loss):
    process = HybridMixing(5, 3, b)
    value = integral(LOGITS, 2, process)
    p = torch.where(torch.arange(5) == 3, -torch.inf, LOGITS).softmax(-1)
    ends = []
    for lam in (f64(9.0), f64(-9.0)):
        q, q_hat = process.marginal(torch.eye(5).double()[2][None], lam)[0], process.marginal(p[None], lam)[0]
        ends.append(float(torch.where(q > 0, q * torch.log(q.clamp(min=1e-300) / q_hat.clamp(min=1e-300)), 0.0).sum()))
    assert value == pytest.approx(ends[0] - ends[1], rel=1e-12)
    assert value == pytest.approx(exact, abs=5.1e-9)
    assert value / Z_LINEAR == pytest.approx(estimator, abs=5.1e-9)
    nodes, weights = gauss(-9, 9)
    terms, q = over_z(LOGITS, 2, nodes, process)
    density = torch.sigmoid(nodes) * torch.sigmoid(-nodes) / Z_LINEAR
    assert float((weights * density * (q * terms.loss).sum(-1)).sum()) == pytest.approx(loss, abs=5.1e-9)
    assert float((weights * density * (q * terms.elbo).sum(-1)).sum()) == pytest.approx(estimator, abs=5.1e-9)


@pytest.mark.parametrize("rate", SCHEDULES)
@pytest.mark.parametrize(("b", "value"), GOLDEN["schedule_invariance"]["rows"])
def test_the_bound_does_not_depend_on_the_rate(b, value, rate):
    """Levels drawn by the rate's own quantile and divided by its own density give one integral."""
    law, process = SCHEDULES[rate](), HybridMixing(5, 3, b)
    u, weights = gauss(0, 1, panels=400)
    log_snr = torch.from_numpy(law.log_snr(u.numpy()))
    terms, q = over_z(f64(0.3, -0.7, 1.1, 0, 0.2), 2, log_snr, process)
    estimate = float((weights * (q * terms.loss).sum(-1) / law.normalised_density(log_snr)).sum())
    assert estimate == pytest.approx(value, abs=5.1e-8)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("b", [-1000.0, -2.0, 0.0, 2.0, 1000.0])
def test_the_mean_weight_is_beta(b, scale):
    nodes, weights = gauss(-9, 9)
    terms, q = over_z(LOGITS, 2, nodes, HybridMixing(5, 3, b, scale))
    mean = (q * terms.weight).sum(-1)
    torch.testing.assert_close(mean, torch.sigmoid(-nodes), rtol=1e-12, atol=1e-15)
    p = torch.sigmoid(nodes) * torch.sigmoid(-nodes)
    assert float((weights * p / Z_LINEAR * mean).sum()) == pytest.approx(0.5, rel=1e-12)
    assert float((weights * mean / Z_LINEAR).sum()) == pytest.approx(9.0022, abs=5e-5)


@pytest.mark.parametrize("b", [-1000.0, 0.0, 2.0, 1000.0])
def test_the_prior_of_one_token_is_a_tight_bound(b):
    logits = with_mask(ONE.log())
    value = sum(float(ONE[x]) * integral(logits, x, HybridMixing(4, 3, b), -40, 40, 200) for x in range(3))
    assert value == pytest.approx(GOLDEN["one_token"]["entropy"], abs=5.1e-9)


@pytest.mark.parametrize(("b", "value"), GOLDEN["one_token"]["truncated"])
def test_the_missing_ends_of_the_schedule_cost_what_they_should(b, value):
    logits = with_mask(ONE.log())
    got = sum(float(ONE[x]) * integral(logits, x, HybridMixing(4, 3, b)) for x in range(3))
    assert got == pytest.approx(value, abs=5.1e-9)


@pytest.mark.parametrize(("b", "value"), GOLDEN["one_token"]["own_posterior"])
def test_using_the_evidence_of_a_tokens_own_noise_is_worse(b, value):
    process = HybridMixing(4, 3, b)
    nodes, weights = gauss(-25, 25, 200)
    like = torch.stack([process.marginal(torch.eye(4).double()[x].expand(len(nodes), 4), nodes) for x in range(3)], -1)
    posterior = (ONE * like).clamp(min=1e-280)  # [n, z, x]
    logits = with_mask(posterior.log())
    got = 0.0
    for x in range(3):
        terms, q = over_z(logits, x, nodes, process)
        got += float(ONE[x] * (weights * (q * terms.loss).sum(-1)).sum())
    assert got == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("b", [-1000.0, 0.0, 1000.0])
def test_leave_one_out_posteriors_of_two_tokens_are_a_tight_bound(b):
    joint = torch.from_numpy(np.random.default_rng(1).dirichlet(0.5 * np.ones(9)).reshape(3, 3))
    process = HybridMixing(4, 3, b)
    nodes, weights = gauss(-30, 30, 150)
    q = torch.stack([process.marginal(torch.eye(4).double()[x].expand(len(nodes), 4), nodes) for x in range(3)], 1)
    total = 0.0
    for table in (joint, joint.T):  # the token predicted comes first, the other gives the evidence z
        logits = with_mask(torch.einsum("xy,nyz->nzx", table, q).clamp(min=1e-280).log())  # [n, z_other, V]
        for x in range(3):
            for other in range(4):
                terms, q_x = over_z(logits[:, other].unsqueeze(1), x, nodes, process)
                weight_other = torch.einsum("y,ny->n", table[x], q[:, :, other])
                total += float((weights * weight_other * (q_x * terms.loss).sum(-1)).sum())
    entropy = float(-(joint * joint.log()).sum())
    assert entropy == pytest.approx(GOLDEN["two_tokens"]["entropy"], abs=5.1e-9)
    assert total == pytest.approx(entropy, abs=2e-8)


def uniform_sums(log_snr: torch.Tensor, process: NoiseProcess) -> VocabularySums:
    """What the zero-initialised head gives: p = 1 / N everywhere."""
    log_n = math.log(process.num_real)
    y = process.log_rho(log_snr).clamp(max=LOG_RHO_LIMIT) - log_n
    log_p = torch.full_like(log_snr, -log_n)
    log_odds = torch.full_like(log_snr, math.log(process.num_real - 1))
    return VocabularySums(log_odds, log_p, (process.num_real - 1) * torch.logaddexp(y, 0 * y))


@pytest.mark.parametrize("sequence", GOLDEN["step_0"]["rows"], ids=lambda sequence: f"shift {sequence[0]}")
@pytest.mark.parametrize("vocab", [131072, 50258])
def test_a_blind_model_pays_what_step_0_must_print(sequence, vocab):
    b, *rest = sequence
    elbo, loss, is_elbo, is_loss = rest[:4] if vocab == 131072 else (*rest[4:], None, None)
    process = HybridMixing(vocab, 3, b)
    nodes, weights = gauss(-9, 9)
    alpha, beta = torch.sigmoid(nodes), torch.sigmoid(-nodes)
    u, mask = process.uniform_prob(nodes), process.mask_prob(nodes)
    got = {"elbo": 0.0, "loss": 0.0, "is_elbo": 0.0, "is_loss": 0.0}
    classes = {0: alpha + beta * u / process.num_real, 3: beta * mask, 1: beta * u * (1 - 1 / process.num_real)}
    for z, probability in classes.items():  # z = x, z = m, any other token: all alike under a uniform prediction
        x_ids, z_ids = torch.zeros(len(nodes), dtype=torch.int64), torch.full((len(nodes),), z)
        terms = terms_from_sums(uniform_sums(nodes, process), x_ids, z_ids, nodes, process=process)
        is_term = probability * terms.weight * terms.itakura_saito
        density = alpha * beta / Z_LINEAR
        got["elbo"] += float((weights * density * probability * terms.elbo).sum())
        got["loss"] += float((weights * density * probability * terms.loss).sum())
        got["is_elbo"] += float((weights * is_term).sum())
        got["is_loss"] += float((weights * density * is_term).sum())
    assert got["elbo"] == pytest.approx(elbo, abs=5.1e-7)
    assert got["loss"] == pytest.approx(loss, abs=5.1e-7)
    if is_elbo is not None:
        assert got["is_elbo"] == pytest.approx(is_elbo, abs=5.1e-4)
        assert got["is_loss"] == pytest.approx(is_loss, abs=5.1e-5)
    if b == -1000:
        assert got["elbo"] == pytest.approx(math.log(process.num_real), rel=1e-9)


@pytest.mark.parametrize("b", [-1000.0, 0.0, 1000.0])
def test_the_objective_at_the_real_vocabulary_uses_just_those_sums(b):
    process = HybridMixing(131072, 3, b)
    log_snr = f64(-9, 0, 9, -2, 3, 6)
    clean, noised = torch.zeros(6, dtype=torch.int64), torch.tensor([0, 0, 3, 3, 1, 1])
    got = gidd_objective(torch.zeros(6, 131072, dtype=torch.float64), clean, noised, log_snr, mixing=process)
    want = terms_from_sums(uniform_sums(log_snr, process), clean, noised, log_snr, process=process)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-12)
