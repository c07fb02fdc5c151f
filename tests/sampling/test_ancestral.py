"""Reverse steps against golden numbers, Bayes' rule and joints known exactly; the traps of released samplers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from megadiff.diffusion import schedules
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.sampling.ancestral import log_snr_steps, prior, reverse_posterior, reverse_step, sample
from megadiff.sampling.sampler import Prediction, predict
from tests.diffusion.dense import LOGITS, bounds, f64, integral
from tests.support import shapes

GOLDEN = bounds()
P = torch.where(torch.arange(5) == 3, -torch.inf, LOGITS).softmax(-1)
JOINT = torch.from_numpy(np.random.default_rng(1).dirichlet(0.5 * np.ones(9)).reshape(3, 3))
SHIFTS = [-1000.0, -2.0, 0.0, 2.0, 1000.0]


@pytest.mark.parametrize(("b", "z", "want"), GOLDEN["reverse_posterior"]["rows"])
def test_golden_reverse_steps(b, z, want):
    got = reverse_posterior(P[None], torch.tensor([z]), -1.0, 1.0, mixing=HybridMixing(5, 3, b))
    torch.testing.assert_close(got[0], f64(*want), rtol=0, atol=6e-11)  # one printed digit is off by one


@settings(max_examples=60, deadline=None)
@given(b=st.floats(-12, 12), a=st.floats(0.05, 1), t=st.floats(-9, 9), gap=st.floats(0.01, 6))
def test_a_reverse_step_undoes_the_forward_one(b, a, t, gap):
    """Sum over z_t of q_t(p)[z_t] p(z_s | z_t) is q_s(p): with the hybrid scale in its place too."""
    process, s = HybridMixing(5, 3, b, a), t + gap
    at_t, at_s = process.marginal(P[None], f64(t))[0], process.marginal(P[None], f64(s))[0]
    back = reverse_posterior(P.expand(5, 5), torch.arange(5), t, s, mixing=process)
    torch.testing.assert_close(at_t @ back, at_s, rtol=1e-9, atol=1e-12)


def moving_prediction(log_snr: Tensor) -> Tensor:
    """gidd.md 1.10.3: logits [n, V_z, V] that depend on both the noised token and the level."""
    table = f64(*(0.5, -0.3, 0.2, 0, 0.1), *(-0.2, 0.4, 0.1, 0, -0.5), *(0.3, 0.1, -0.6, 0, 0.2))
    table = torch.cat([table, f64(*(0, 0.2, 0.4, 0, -0.3), *(0.1, -0.4, 0.2, 0, 0.6))]).reshape(5, 5)
    lam = log_snr[:, None, None]
    return f64(0.3, -0.7, 1.1, 0, 0.2) + table * torch.tanh(lam / 3) + 0.3 * torch.sin(lam) * f64(1, 0, -1, 0, 0.5)


@pytest.mark.parametrize(
    "sequence", GOLDEN["discrete_limit"]["rows"], ids=lambda sequence: f"shift {sequence[0]} scale {sequence[1]}"
)
def test_the_discrete_bound_converges_to_the_integral_of_the_objective(sequence):
    from tests.diffusion.dense import gauss, over_z

    b, a, *sums, limit = sequence
    process, x = HybridMixing(5, 3, b, a), torch.eye(5).double()[2]
    for count, want in zip((200, 2000, 20000), sums, strict=True):
        levels = torch.linspace(-9, 9, count + 1, dtype=torch.float64)
        at_t, at_s = levels[:-1], levels[1:]
        p = moving_prediction(at_t).masked_fill(torch.arange(5) == 3, -torch.inf).softmax(-1)
        z = torch.arange(5).expand(count, 5)
        t, s = at_t[:, None].expand(count, 5), at_s[:, None].expand(count, 5)
        true = reverse_posterior(x.expand(count, 5, 5), z, t, s, mixing=process)
        model = reverse_posterior(p, z, t, s, mixing=process)
        ratio = torch.where(true > 0, true.clamp(min=1e-300) / model.clamp(min=1e-300), 1.0)
        kl = (true * torch.log(ratio)).sum(-1)
        q = process.marginal(x.expand(count, 5), at_t)
        assert float((q * kl).sum()) == pytest.approx(want, abs=5.1e-8), count
    nodes, weights = gauss(-9, 9)
    terms, q = over_z(moving_prediction(nodes), 2, nodes, process)
    assert float((weights * (q * terms.loss).sum(-1)).sum()) == pytest.approx(limit, abs=5.1e-8)


@pytest.mark.parametrize("shift", SHIFTS)
def test_draws_follow_the_posterior(shift):
    """The mixture a step draws from is the posterior, for every z_t."""
    process, count = HybridMixing(5, 3, shift), 40000
    g = torch.Generator().manual_seed(0)
    for z in range(5):
        if shift == 1000 and z == 3:
            continue
        ids = torch.full((1, count), z)
        prediction = Prediction(P.expand(1, count, 5))
        uniforms = torch.rand(3, 1, count, generator=g, dtype=torch.float64)
        drawn = reverse_step(prediction, ids, -1.0, 1.0, uniforms, process=process)
        want = reverse_posterior(P[None], torch.tensor([z]), -1.0, 1.0, mixing=process)[0].numpy() * count
        seen = np.bincount(drawn[0].numpy(), minlength=5)
        assert (seen[want == 0] == 0).all()
        if (want > 0).sum() > 1:
            assert stats.chisquare(seen[want > 0], want[want > 0]).pvalue > 1e-4


class TwoTokens:
    """The exact denoiser of two correlated tokens: P(x_i | z of the other), at the level `sample` says it is at."""

    def __init__(self, process: NoiseProcess) -> None:
        self.process, self.log_snr = process, f64(0.0)

    def on_step(self, _step: int, log_snr: float, _ids: Tensor) -> None:
        self.log_snr = torch.tensor(log_snr, dtype=torch.float64)

    def __call__(self, ids: Tensor) -> Tensor:
        noise = schedules.beta(self.log_snr) * self.process.pi_at(self.log_snr, ids)
        like = noise.unsqueeze(-1) + schedules.alpha(self.log_snr) * (ids.unsqueeze(-1) == torch.arange(3))
        logits = torch.stack([like[:, 1] @ JOINT.T, like[:, 0] @ JOINT], dim=1).log()
        return torch.nn.functional.pad(logits, (0, 1))


@pytest.mark.parametrize(("shift", "grid"), [(-1000.0, "cosine"), (0.0, "cosine"), (1000.0, "linear")])
def test_with_an_exact_denoiser_the_samples_have_the_true_joint(shift, grid):
    process, sequences = HybridMixing(4, 3, shift), 5000
    toy = TwoTokens(process)
    kwargs = {"sequences": sequences, "length": 2, "steps": 300, "grid": grid, "seed": 1, "reuse_logits": False}
    ids = sample(toy, process=process, on_step=toy.on_step, **kwargs)
    seen = np.bincount((ids[:, 0] * 3 + ids[:, 1]).numpy(), minlength=9)
    assert stats.chisquare(seen, JOINT.numpy().ravel() * sequences).pvalue > 1e-3


def bigram(ids: Tensor) -> Tensor:
    """Some fixed logits [B, L, 9] that depend on the tokens around."""
    table = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    return table[ids] + table.T[ids.roll(1, 1)] + table[ids.roll(-1, 1)] * 0.5


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.3, "temperature": 0.7}])
def test_a_sequence_does_not_depend_on_its_batch(shift, options):
    process = HybridMixing(9, 4, shift)
    kwargs = {"length": 12, "steps": 10, "process": process, "seed": 3, **options}
    whole = sample(bigram, sequences=6, **kwargs)
    assert torch.equal(whole, sample(bigram, sequences=6, **kwargs))
    order = torch.tensor([4, 1, 5])
    part = sample(bigram, sequences=3, sequence_index=order, **kwargs)
    assert torch.equal(part, whole[order])
    assert not bool((whole == 4).any()), "a mask is left"
    assert len({tuple(sequence) for sequence in whole.tolist()}) == 6 or options.get("temperature") == 0
    assert torch.equal(whole, sample(bigram, sequences=6, reuse_logits=False, **kwargs))


@pytest.mark.parametrize("shift", SHIFTS)
def test_prompts_stay_and_holes_are_filled(shift):
    process = HybridMixing(9, 4, shift)
    prompt = torch.tensor([[1, 2, 3, -1, 5], [8, -1, -1, 7, 6]])
    states: list[Tensor] = []
    kwargs = {"sequences": 2, "length": 8, "steps": 6, "process": process, "seed": 0, "prompt": prompt}
    ids = sample(bigram, on_step=lambda _k, _lam, z: states.append(z.clone()), **kwargs)
    given_ids = prompt >= 0
    for state in states:
        assert torch.equal(state[:, :5][given_ids], prompt[given_ids])
    assert len(states) == 7
    assert torch.equal(states[-1], ids)
    assert not bool((ids == 4).any())


def test_the_model_is_called_once_a_step_and_not_where_nothing_changed():
    calls: list[int] = []

    def count(ids: Tensor) -> Tensor:
        calls.append(1)
        return bigram(ids)

    masked = HybridMixing(9, 4, -1000.0)
    sample(count, sequences=1, length=2, steps=200, process=masked, seed=0)
    assert len(calls) <= 4  # at the start, and after each of two tokens appears
    calls.clear()
    sample(count, sequences=1, length=2, steps=20, process=masked, seed=0, reuse_logits=False)
    assert len(calls) in (20, 21)


def test_a_revealed_token_that_is_truncated_away_stays_and_gives_no_nan():
    """The released sampler divides 0 by 0 here: temperature 0 puts nothing on the token already there."""
    process = HybridMixing(5, 3, -1000.0)
    sure = torch.eye(5).double()[1].expand(1, 5, 5)
    back = reverse_posterior(sure, torch.arange(5)[None], -1.0, 1.0, mixing=process)
    assert bool(back.isfinite().all())
    torch.testing.assert_close(back.sum(-1), torch.ones(1, 5).double())
    assert back[0].argmax(-1).tolist()[:3] == [0, 1, 2]
    drawn = reverse_step(Prediction(sure), torch.arange(5)[None], -1.0, 1.0, torch.rand(3, 1, 5), process=process)
    assert drawn[0, [0, 1, 2, 4]].tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", SHIFTS)
def test_posteriors_are_distributions_at_both_ends_of_the_levels(shift, dtype):
    process = HybridMixing(5, 3, shift)
    for t, s in ((-9.0, -9.0), (-9.0, 9.0), (8.99, 9.0), (-9.0, -8.99)):
        back = reverse_posterior(P.to(dtype).expand(5, 5), torch.arange(5), t, s, mixing=process)
        assert back.dtype == dtype
        assert bool((back >= 0).all())
        torch.testing.assert_close(back.sum(-1), torch.ones(5, dtype=dtype))


def test_the_prior_is_all_real_tokens_or_all_masks_in_the_two_limits():
    sequences = torch.arange(50)
    uniform = prior(sequences, 400, -9.0, process=HybridMixing(9, 4, 1000), seed=0)
    counts = np.bincount(uniform.numpy().ravel(), minlength=9)
    assert counts[4] == 0
    assert stats.chisquare(np.delete(counts, 4)).pvalue > 1e-3
    assert bool((prior(sequences, 400, -9.0, process=HybridMixing(9, 4, -1000), seed=0) == 4).all())
    half = prior(sequences, 400, 0.0, process=HybridMixing(9, 4, 0), seed=0)
    assert float((half == 4).float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("grid", ["cosine", "linear"])
def test_the_grid_runs_from_end_to_end_without_losing_a_step(grid):
    levels = log_snr_steps(10, grid=grid)
    assert levels[0] == pytest.approx(9, abs=1e-9)
    assert levels[-1] == pytest.approx(-9, abs=1e-9)
    assert (np.diff(levels) < 0).all()
    alpha = [1 / (1 + math.exp(-lam)) for lam in levels]
    share = [(v - alpha[-1]) / (alpha[0] - alpha[-1]) for v in alpha]
    want = [1 - k / 10 if grid == "linear" else (1 + math.cos(math.pi * k / 10)) / 2 for k in range(11)]
    np.testing.assert_allclose(share, want, atol=1e-9)


def test_no_global_generator_is_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(bigram, sequences=1, length=3, steps=2, process=HybridMixing(9, 4, 0.0), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_that_do_not_fit_are_refused():
    process = HybridMixing(9, 4, 0.0)
    kwargs = {"sequences": 2, "length": 3, "steps": 2, "process": process, "seed": 0}
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sample(bigram, **{**kwargs, "steps": 0})
    with pytest.raises(ValueError, match=r"prompt must have shape \(2, at most 3\)"):
        sample(bigram, prompt=torch.zeros(2, 4, dtype=torch.int64), **kwargs)
    with shapes.unchecked(), pytest.raises(ValueError, match="sequence_index must have shape"):
        sample(bigram, sequence_index=torch.arange(3), **kwargs)
    with shapes.unchecked(), pytest.raises(ValueError, match="grid must be cosine or linear"):
        sample(bigram, **{**kwargs, "grid": "square"})
    with pytest.raises(ValueError, match="goes to a cleaner level"):
        reverse_posterior(P[None], torch.tensor([0]), 1.0, -1.0, mixing=HybridMixing(5, 3, 0.0))
    with shapes.unchecked(), pytest.raises(ValueError, match="probs must have shape"):
        reverse_posterior(P[None], torch.tensor([0, 1]), -1.0, 1.0, mixing=HybridMixing(5, 3, 0.0))


def test_the_bound_and_the_sampler_speak_of_one_process():
    """The integral of the objective over a level range is the sum of KLs of many reverse steps over it."""
    process = HybridMixing(5, 3, 0.5, 0.7)
    levels = torch.linspace(-2, 3, 20001, dtype=torch.float64)
    x, count = torch.eye(5).double()[2], 20000
    z = torch.arange(5).expand(count, 5)
    t, s = (part[:, None].expand(count, 5) for part in (levels[:-1], levels[1:]))
    true = reverse_posterior(x.expand(count, 5, 5), z, t, s, mixing=process)
    model = reverse_posterior(predict(LOGITS.expand(count, 5, 5), process).probs, z, t, s, mixing=process)
    kl = (true * torch.log(true / model)).sum(-1)
    discrete = float((process.marginal(x.expand(count, 5), levels[:-1]) * kl).sum())
    assert discrete == pytest.approx(integral(LOGITS, 2, process, -2, 3), rel=2e-4)
