"""The time form: its weights, densities and bounds are those of its definition in t, rewritten in log-SNR."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from megadiff.diffusion import exact, schedules
from megadiff.diffusion.config import noise_config, objective_config
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess, build_process
from megadiff.diffusion.noising import evaluation_noise, noise_batch
from megadiff.diffusion.objective import SURROGATE, build_weighting, gidd_objective
from megadiff.diffusion.processes.gidd_time import GiddTime, TimeSchedule
from megadiff.diffusion.schedules import LinearSchedule, UniformSchedule
from megadiff.diffusion.weightings.dynamic import dynamic_weight
from megadiff.errors import ConfigError
from megadiff.sampling.ancestral import reverse_posterior, sample
from tests.diffusion.dense import LOGITS, f64, gauss, integral, over_z
from tests.golden import make_noise_hashes
from tests.sampling.test_ancestral import JOINT, TwoTokens

V, MASK = 5, 3
PROCESSES = [(0.0, 1.0), (0.01, 1.0), (0.2, 1.0), (0.9, 1.0), (0.2, 0.5), (0.3, 1.7), (0.1, 2.0)]
TIMES = f64(1e-6, 1e-4, 0.01, 0.119, 0.5, 0.881, 0.99, 1 - 1e-4)


def c_of(t: Tensor, p: float, g: float) -> Tensor:
    return 2**g * p / (1 - p) * (t * (1 - t)) ** (g / 2)


def log_snr_of(t: Tensor, p: float, g: float) -> Tensor:
    return torch.log((1 - t) / (t + c_of(t, p, g)))


def time_weights(t: Tensor, p: float, g: float) -> tuple[Tensor, Tensor, Tensor]:
    """(z = x, uniform, mask), as gidd.md 1.12 has them from the predecessor's code."""
    c, real = c_of(t, p, g), V - 1
    slope = c * (g / 2) * (1 - 2 * t) / (t * (1 - t))
    top = c + (1 - t) * slope
    return top / (real * (1 - t) * (1 - t + c / real)), top / ((1 - t) * c), 1 / ((1 - t) * t)


def time_marginals(t: Tensor, p: float, g: float, probs: Tensor) -> Tensor:
    """q_t = alpha_t probs + beta_t pi_t from the definition in time, [..., V]."""
    c = c_of(t, p, g).unsqueeze(-1)
    t = t.unsqueeze(-1)
    ids = torch.arange(V)
    noise = torch.where(ids == MASK, t, c / (V - 1)) / (1 + c)
    return (1 - t) / (1 + c) * probs + noise


def time_integral(logits: Tensor, x: int, p: float, g: float, eps: float) -> float:
    """Integral over t of E_z[time weight (KL + IS)], with nothing of ours; logits [V], [V_z, V] or [n, V_z, V]."""
    s, weights = gauss(float(torch.logit(f64(eps))), float(torch.logit(f64(1 - eps))), panels=120)
    t = torch.sigmoid(s)
    weights = weights * t * (1 - t)
    clean = torch.eye(V, dtype=torch.float64)[x]
    predicted = logits.masked_fill(torch.arange(V) == MASK, -torch.inf).softmax(-1)
    predicted = predicted.expand(len(t), V, V)  # [n, z, v]
    at = t.unsqueeze(-1).expand(len(t), V)
    q, q_hat = time_marginals(at, p, g, clean.expand(len(t), V, V)), time_marginals(at, p, g, predicted)
    kl = torch.where(q > 0, q * torch.log(q.clamp(min=1e-300) / q_hat.clamp(min=1e-300)), 0.0).sum(-1)
    q_z, q_hat_z = torch.diagonal(q, dim1=-2, dim2=-1), torch.diagonal(q_hat, dim1=-2, dim2=-1)
    ratio = torch.where(q_z > 0, q_z / q_hat_z.clamp(min=1e-300), 1.0)
    on_x, uniform, mask = time_weights(t, p, g)
    rest = torch.zeros_like(t) if p == 0 else uniform
    weight = torch.stack([on_x if z == x else mask if z == MASK else rest for z in range(V)], dim=-1)
    return float((weights * (q_z * weight * (kl + ratio - torch.log(ratio) - 1)).sum(-1)).sum())


@pytest.mark.parametrize(("p", "g"), PROCESSES)
def test_the_process_is_that_of_its_definition_in_time(p, g):
    process, log_snr = NoiseProcess(V, MASK, GiddTime(p, g)), log_snr_of(TIMES, p, g)
    c = c_of(TIMES, p, g)
    torch.testing.assert_close(schedules.alpha(log_snr), (1 - TIMES) / (1 + c), rtol=1e-12, atol=0)
    probs = torch.eye(V, dtype=torch.float64)[2].expand(len(TIMES), V)
    torch.testing.assert_close(process.marginal(probs, log_snr), time_marginals(TIMES, p, g, probs), rtol=1e-9, atol=0)
    torch.testing.assert_close(process.mask_prob(log_snr), TIMES / (TIMES + c), rtol=1e-9, atol=0)
    if p > 0:
        assert float(process.uniform_prob(log_snr)[4] * schedules.beta(log_snr)[4]) == pytest.approx(p)


@pytest.mark.parametrize(("p", "g"), PROCESSES)
def test_weights_in_time_are_those_in_log_snr_times_its_slope(p, g):
    t = TIMES.clone().requires_grad_()
    log_snr = log_snr_of(t, p, g)
    (slope,) = torch.autograd.grad(log_snr.sum(), t)
    log_snr, process = log_snr.detach(), NoiseProcess(V, MASK, GiddTime(p, g))
    on_x, uniform, mask = time_weights(TIMES, p, g)
    clean = torch.full((len(TIMES),), 2)
    for z, want in ((2, on_x), (0, uniform), (MASK, mask)):
        if p == 0 and z == 0:
            continue
        got = process.weight(log_snr, clean, torch.full_like(clean, z)) * slope.abs()
        torch.testing.assert_close(got, want, rtol=1e-8, atol=0, msg=f"z = {z}")
    density = TimeSchedule(GiddTime(p, g)).density(log_snr)
    torch.testing.assert_close(density, 1 / slope.abs(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("p", "g"), PROCESSES)
def test_weights_follow_their_definition_in_log_snr(p, g):
    process = NoiseProcess(V, MASK, GiddTime(p, g))
    for level in (-20.0, -9.0, -1.0, 0.0, 2.0, 5.0, 12.0):
        at, z = f64(level).requires_grad_(), torch.arange(V)
        pi = process.pi(at)[0]
        slope = torch.stack([torch.autograd.grad(value, at, retain_graph=True)[0][0] for value in pi])
        torch.testing.assert_close(process.pi_prime(at)[0], slope, rtol=1e-8, atol=1e-14)
        weight = process.weight(at.detach().expand(V), torch.full((V,), 2), z)
        if p == 0:
            slope = slope * (z == MASK)
        torch.testing.assert_close(weight * (pi + torch.exp(at) * (z == 2)), pi - slope, rtol=1e-8, atol=1e-13)
        assert bool((weight >= 0).all())
        q = process.marginal(torch.eye(V, dtype=torch.float64)[2][None], at)[0]
        assert float((q.detach() * weight).sum()) == pytest.approx(float(torch.sigmoid(-at.detach())), rel=1e-9)
        torch.testing.assert_close(process.pi_at(at.expand(V), z), pi)


@pytest.mark.parametrize("gamma", [0.05, 0.5, 1.0, 1.7, 2.0])
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.2, 0.9, 0.999])
def test_the_time_of_a_level_is_found_to_the_last_digits(p, gamma):
    law = GiddTime(p, gamma)
    s = np.linspace(-50, 50, 4001)
    log_snr = -s - exact.log(1 + exact.exp(law.logit_u_at(s, exact)))
    near = np.abs(log_snr) <= 50
    found = law.logit_t(log_snr[near], exact)
    np.testing.assert_allclose(
        -found - np.log1p(np.exp(law.logit_u_at(found, exact))), log_snr[near], rtol=0, atol=2e-14
    )
    tensor = law.logit_t(torch.from_numpy(log_snr[near]), torch).numpy()
    np.testing.assert_allclose(tensor, found, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("p", "g"), PROCESSES)
def test_quantile_density_and_mass_belong_together(p, g):
    law = TimeSchedule(GiddTime(p, g), 1e-3)
    nodes, weights = gauss(law.min_log_snr, law.max_log_snr, panels=200)
    assert float((weights * law.density(nodes)).sum()) == pytest.approx(law.mass, rel=1e-11)
    for u in (0.0, 0.013, 0.25, 0.5, 0.9, 1.0):
        log_snr = float(law.log_snr(u))
        assert log_snr == pytest.approx(float(log_snr_of(f64(1e-3 + u * 0.998), p, g)), abs=1e-11)
        nodes, weights = gauss(log_snr, law.max_log_snr, panels=200)
        assert float((weights * law.normalised_density(nodes)).sum()) == pytest.approx(u, abs=1e-10)
    assert (np.diff(law.log_snr(np.linspace(0, 1, 999))) < 0).all()


@pytest.mark.parametrize(("p", "g"), [(0.0, 1.0), (0.01, 1.0), (0.2, 1.0), (0.3, 1.7), (0.2, 0.5)])
def test_the_bound_in_time_is_the_bound_in_log_snr(p, g):
    """Of one law over one range of levels: for a constant prediction, one that depends on z, and on lambda too."""
    eps, process = 1e-4, NoiseProcess(V, MASK, GiddTime(p, g))
    law = TimeSchedule(GiddTime(p, g), eps)
    ends = law.min_log_snr, law.max_log_snr
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    constant = integral(LOGITS, 2, process, *ends, panels=200)
    assert time_integral(LOGITS, 2, p, g, eps) == pytest.approx(constant, rel=1e-8)
    by_token = integral(table, 2, process, *ends, panels=200)
    assert time_integral(table, 2, p, g, eps) == pytest.approx(by_token, rel=1e-8)
    assert by_token != pytest.approx(constant, rel=1e-2)
    nodes, weights = gauss(*ends, panels=200)
    terms, q = over_z(table, 2, nodes, process)
    for rate in (law, UniformSchedule(*ends), LinearSchedule(*ends)):
        terms = gidd_objective(
            table.expand(len(nodes), V, V),
            torch.full((len(nodes), V), 2),
            torch.arange(V).expand(len(nodes), V),
            nodes.unsqueeze(-1).expand(len(nodes), V),
            mixing=process.with_schedule(rate),
        )
        assert float((weights * rate.density(nodes) * (q * terms.elbo).sum(-1)).sum()) == pytest.approx(by_token)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_constant_prediction_telescopes(p):
    process, law = NoiseProcess(V, MASK, GiddTime(p)), TimeSchedule(GiddTime(p))
    probs = LOGITS.masked_fill(torch.arange(V) == MASK, -torch.inf).softmax(-1)
    ends = []
    for level in (law.max_log_snr, law.min_log_snr):
        q = process.marginal(torch.eye(V).double()[2][None], f64(level))[0]
        q_hat = process.marginal(probs[None], f64(level))[0]
        ends.append(float(torch.where(q > 0, q * torch.log(q.clamp(min=1e-300) / q_hat.clamp(min=1e-300)), 0.0).sum()))
    value = integral(LOGITS, 2, process, law.min_log_snr, law.max_log_snr, panels=200)
    assert value == pytest.approx(ends[0] - ends[1], rel=1e-10)


def test_without_uniform_noise_it_is_masked_noise_on_the_linear_schedule():
    time, masked = NoiseProcess(11, 6, GiddTime()), HybridMixing(11, 6, -1000.0)
    law = TimeSchedule(GiddTime(), 1e-4)
    linear = LinearSchedule(law.min_log_snr, law.max_log_snr)
    assert law.max_log_snr == -law.min_log_snr == pytest.approx(float(torch.logit(f64(1 - 1e-4))))
    shares = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(law.log_snr(shares), linear.log_snr(shares), rtol=0, atol=1e-12)
    levels = torch.from_numpy(law.log_snr(shares))
    torch.testing.assert_close(law.density(levels), linear.density(levels), rtol=1e-12, atol=0)
    assert law.mass == pytest.approx(linear.mass, rel=1e-12)
    assert time.is_masked_limit
    g = torch.Generator().manual_seed(0)
    logits, clean = torch.randn(1001, 11, generator=g, dtype=torch.float64), torch.arange(1001) % 6
    for noised in (clean, torch.full_like(clean, 6)):
        got, want = (gidd_objective(logits, clean, noised, levels, mixing=process) for process in (time, masked))
        for name, term in got._asdict().items():
            torch.testing.assert_close(term, getattr(want, name), rtol=0, atol=0, msg=name)
    sequences = np.arange(64).reshape(4, 16) % 6
    kwargs = {"seed": 3, "sample_index": np.arange(4), "global_batch": 4}
    got, want = (noise_batch(sequences, process=process, **kwargs).columns() for process in (time, masked))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("level", [0, 3, 7])
def test_kept_masked_and_random_tokens_come_as_often_as_the_process_says(p, level):
    process = NoiseProcess(11, 6, GiddTime(p), TimeSchedule(GiddTime(p)))
    clean = np.full((64, 2048), 4)
    kwargs = {"seed": 0, "sequence_index": np.arange(64), "level": level, "num_levels": 8}
    got = evaluation_noise(clean, process=process, **kwargs)
    log_snr = got.log_snr[:, 0].double()
    q = process.marginal(torch.eye(11).double()[4].expand(64, 11), log_snr)
    expected = (q.sum(0) * 2048).numpy()
    seen = np.bincount(got.noised.reshape(-1).numpy(), minlength=11)
    assert (seen[expected == 0] == 0).all()
    some = expected > 0
    assert stats.chisquare(seen[some], expected[some]).pvalue > 1e-3


def test_every_global_batch_covers_time_evenly():
    law = GiddTime(0.2)
    kwargs = {"seed": 5, "process": NoiseProcess(11, 6, law, TimeSchedule(law, 1e-4)), "global_batch": 24}
    for step in range(3):
        index = np.arange(step * 24, (step + 1) * 24)
        log_snr = noise_batch(np.ones((24, 2), dtype=np.int64), sample_index=index, **kwargs).log_snr[:, 0]
        t = torch.sigmoid(law.logit_t(log_snr.double(), torch))
        assert sorted(((t - 1e-4) / (1 - 2e-4) * 24).floor().int().tolist()) == list(range(24))


def test_levels_and_shares_have_the_same_bits_in_any_company():
    for p, g in PROCESSES:
        law = GiddTime(p, g)
        rate, process = TimeSchedule(law), NoiseProcess(11, 6, law)
        u = np.random.default_rng(0).uniform(size=257)
        log_snr = rate.log_snr(u)
        assert all(rate.log_snr(value) == want for value, want in zip(u, log_snr, strict=True))
        assert (rate.log_snr(u[1::3]) == log_snr[1::3]).all()
        shares = process.exact_uniform_prob(log_snr)
        assert (process.exact_uniform_prob(log_snr[1::3]) == shares[1::3]).all()
        want = process.uniform_prob(torch.from_numpy(log_snr))
        torch.testing.assert_close(torch.from_numpy(shares), want, rtol=1e-12, atol=1e-300)


def test_the_bits_are_those_of_the_committed_file():
    assert make_noise_hashes.make_time() == json.loads(make_noise_hashes.TIME_FILE.read_text())


def test_dynamic_weights_are_the_predecessors():
    process = NoiseProcess(V, MASK, GiddTime(0.2))
    log_snr = f64(-9, 0, 4, 9)
    clean = torch.full((4,), 2)
    at = {z: dynamic_weight(process, log_snr, clean, torch.full_like(clean, z)) for z in (0, 2, MASK)}
    assert at[MASK].tolist() == [2.0] * 4
    assert at[0].tolist() == [1.0] * 4
    torch.testing.assert_close(at[2], (0.5 / V * torch.exp(log_snr / 2)).clamp(max=2.0))
    masked = dynamic_weight(NoiseProcess(V, MASK, GiddTime()), log_snr, clean, clean)
    assert masked.tolist() == [0.0] * 4
    terms, plain = (
        gidd_objective(
            LOGITS.expand(4, V), clean, torch.tensor([0, 2, MASK, 2]), log_snr, mixing=process, is_weight=0.5, **kwargs
        )
        for kwargs in ({"weighting": build_weighting(objective_config(weighting="dynamic"))}, {"weighting": SURROGATE})
    )
    weight = f64(1.0, at[2][1], 2.0, at[2][3])
    torch.testing.assert_close(terms.loss, weight * (terms.kl + 0.5 * terms.itakura_saito))
    torch.testing.assert_close(terms.elbo, plain.elbo)
    torch.testing.assert_close(terms.weight, plain.weight)
    with pytest.raises(ConfigError, match=r"set noise\.process to gidd_time"):
        dynamic_weight(HybridMixing(V, MASK, 0.0), log_snr, clean, clean)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
def test_float32_is_close_to_float64(p):
    process, g = NoiseProcess(300, 3, GiddTime(p)), torch.Generator().manual_seed(1)
    logits = torch.randn(200, 300, generator=g) * 3
    clean = torch.randint(4, 300, (200,), generator=g)
    noised = torch.where(torch.arange(200) % 3 == 0, clean, 3 if p == 0 else torch.arange(200) + 4)
    noised[1::3] = 3
    noised = torch.where((noised != 3) & (noised != clean) & (p == 0), 3, noised)
    log_snr = torch.rand(200, generator=g) * 18 - 9
    kwargs = {"mixing": process.with_schedule(TimeSchedule(GiddTime(p)))}
    got = gidd_objective(logits, clean, noised, log_snr, **kwargs)
    want = gidd_objective(logits.double(), clean, noised, log_snr.double(), **kwargs)
    assert got.loss.dtype == torch.float32
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(got.elbo.double(), want.elbo, rtol=2e-4, atol=1e-3)


def test_a_reverse_step_inverts_the_forward_one():
    process, at_t, at_s = NoiseProcess(V, MASK, GiddTime(0.3)), -1.0, 1.5
    probs = f64(0.1, 0.2, 0.4, 0.0, 0.3).expand(V, V)
    posterior = reverse_posterior(probs, torch.arange(V), at_t, at_s, mixing=process)
    torch.testing.assert_close(posterior.sum(-1), torch.ones(V).double())
    at = process.marginal(probs[:1], f64(at_t))[0]
    torch.testing.assert_close((at.unsqueeze(-1) * posterior).sum(0), process.marginal(probs[:1], f64(at_s))[0])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_with_an_exact_denoiser_the_samples_have_the_true_joint(p):
    """Down to log-SNR 9: at time_eps = 1e-4, where training stops, 1.3 % of the tokens are still noise for p = 0.4."""
    process, sequences = NoiseProcess(4, 3, GiddTime(p)), 5000
    toy = TwoTokens(process)
    kwargs = {"sequences": sequences, "length": 2, "steps": 300, "seed": 1, "reuse_logits": False}
    ids = sample(toy, process=process, on_step=toy.on_step, **kwargs)
    seen = np.bincount((ids[:, 0] * 3 + ids[:, 1]).numpy(), minlength=9)
    assert stats.chisquare(seen, JOINT.numpy().ravel() * sequences).pvalue > 1e-3


def test_a_run_description_makes_process_and_schedule():
    config = noise_config(process="gidd_time", p_uniform=0.1, time_eps=1e-3)
    law = GiddTime(0.1, 1.0)
    assert build_process(config, vocab_size=9, mask_id=3) == NoiseProcess(9, 3, law, TimeSchedule(law, 1e-3))


@pytest.mark.parametrize(("p", "g", "match"), [(1.0, 1.0, "p_uniform"), (0.1, 2.5, "negative rate"), (0.1, 0, "gamma")])
def test_a_process_that_cannot_be_is_refused(p, g, match):
    with pytest.raises(ConfigError, match=match):
        GiddTime(p, g)


def test_an_interval_of_time_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"time_eps must lie between 0 and 0\.5, got 0\.5"):
        TimeSchedule(GiddTime(), 0.5)
    with pytest.raises(ConfigError, match="got mask id 9 of 9"):
        NoiseProcess(9, 9, GiddTime())
