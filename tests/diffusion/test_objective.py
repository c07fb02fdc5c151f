"""The objective against golden tokens, against its dense definition, and at the ends of its range."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.diffusion.config import objective_config
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.objective import Terms, _minus_log1p, build_weighting, gidd_objective, loss_weights
from megadiff.diffusion.schedules import UniformSchedule
from tests.diffusion.dense import LOGITS, dense_objective, f64, read_csv
from tests.support import shapes

CASES = {sequence["case"]: sequence for sequence in read_csv("objective_terms.csv")}
MIXES = [(-20.0, 1.0), (-2.0, 1.0), (0.0, 1.0), (2.0, 1.0), (1000.0, 1.0), (1.0, 0.5)]


def token(case: str, logits: torch.Tensor = LOGITS) -> Terms:
    sequence = CASES[case]
    process = HybridMixing(5, 3, float(sequence["b"]), float(sequence["a"]))
    x, z = torch.tensor([[int(sequence["x"])]]), torch.tensor([[int(sequence["z"])]])
    return gidd_objective(logits[None, None], x, z, f64(float(sequence["lambda"]))[None], mixing=process)


def random_tokens(count: int, vocab: int, mask: int, *, seed: int, masked: bool = False):
    """Logits of uneven spread, and tokens of which a third each are x, the mask, and others."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocab, generator=g, dtype=torch.float64) * (1 + 3 * torch.rand(count, 1, generator=g))
    clean = torch.randint(vocab - 1, (count,), generator=g)
    clean += clean >= mask
    other = torch.randint(vocab - 1, (count,), generator=g)
    other += other >= mask
    kind = torch.randint(2 if masked else 3, (count,), generator=g)
    noised = torch.where(kind == 0, clean, torch.where(kind == 1, mask, other))
    log_snr = torch.rand(count, generator=g, dtype=torch.float64) * 18 - 9
    log_snr[:4] = f64(-9, 9, -8.9, 8.9)
    return logits, clean, noised, log_snr


@pytest.mark.parametrize("case", CASES)
def test_a_golden_token_is_met_to_the_printed_digits(case):
    terms, sequence = token(case), CASES[case]
    for name, value in (("w", terms.weight), ("kl", terms.kl), ("is", terms.itakura_saito), ("loss", terms.loss)):
        assert value.item() == pytest.approx(float(sequence[name]), rel=1e-11, abs=1e-15), name
    assert terms.elbo.item() == pytest.approx(float(sequence["elbo"]), rel=1e-11, abs=1e-15)
    alpha_beta = torch.sigmoid(f64(float(sequence["lambda"]))) * torch.sigmoid(-f64(float(sequence["lambda"])))
    assert (terms.weight / alpha_beta).item() == pytest.approx(float(sequence["w_over_p"]), rel=1e-11, abs=1e-15)


@pytest.mark.parametrize("sequence", read_csv("objective_gradients.csv"), ids=lambda sequence: sequence["case"])
def test_a_golden_gradient_is_met_to_the_printed_digits(sequence):
    logits = LOGITS.clone().requires_grad_()
    token(sequence["case"], logits).loss.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, f64(*(float(sequence[f"g{i}"]) for i in range(5))), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mask", [0, 7, 16])
@pytest.mark.parametrize(("b", "a"), MIXES)
def test_closed_forms_equal_the_dense_definition_in_value_and_gradient(b, a, mask):
    logits, clean, noised, log_snr = random_tokens(200, 17, mask, seed=int(b) + mask)
    if b == 1000:
        noised = torch.where(noised == mask, clean, noised)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = gidd_objective(ours, clean, noised, log_snr, mixing=HybridMixing(17, mask, b, a)).loss
    dense, weight = dense_objective(theirs, clean, noised, log_snr, vocab=17, mask=mask, b=b, a=a)
    torch.testing.assert_close(loss, dense, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        gidd_objective(logits, clean, noised, log_snr, mixing=HybridMixing(17, mask, b, a)).weight,
        weight,
        rtol=1e-9,
        atol=1e-13,
    )
    loss.sum().backward()
    dense.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)


def test_the_masked_branch_equals_the_dense_definition():
    logits, clean, noised, log_snr = random_tokens(100, 17, 5, seed=3, masked=True)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    terms = gidd_objective(ours, clean, noised, log_snr, mixing=HybridMixing(17, 5, -1000))
    at_mask = noised == 5
    log_p = theirs.masked_fill(torch.arange(17) == 5, -torch.inf).log_softmax(-1)
    nll = -log_p.gather(-1, clean[:, None]).squeeze(-1)
    expected = torch.where(at_mask, torch.sigmoid(log_snr) * nll, 0.0)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(terms.elbo, torch.where(at_mask, nll / torch.sigmoid(-log_snr), 0.0), rtol=1e-12, atol=0)
    terms.loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def test_the_general_branch_approaches_the_masked_one_as_the_shift_falls():
    logits, clean, noised, log_snr = random_tokens(60, 17, 5, seed=4, masked=True)
    limit = gidd_objective(logits, clean, noised, log_snr, mixing=HybridMixing(17, 5, -1000)).loss
    gaps = [
        float((gidd_objective(logits, clean, noised, log_snr, mixing=HybridMixing(17, 5, b)).loss - limit).abs().max())
        for b in (-10.0, -20.0, -30.0, -80.0)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[3] < 1e-15


@pytest.mark.parametrize("shift", [-1000.0, -127.0, -75.0, -2.0, 0.0, 2.0, 1000.0])
@pytest.mark.parametrize("vocab", [5, 4096])
def test_float32_is_finite_non_negative_and_close_to_float64(shift, vocab):
    masked = shift < -50
    logits, clean, noised, log_snr = random_tokens(64, vocab, 3, seed=9, masked=masked)
    logits[10:20] *= 100  # certain predictions, right and wrong
    logits[15:20].scatter_(1, clean[15:20, None], 1e3)
    if shift == 1000:
        noised = torch.where(noised == 3, clean, noised)
    single = logits.float().requires_grad_()
    process = HybridMixing(vocab, 3, shift)
    got = gidd_objective(single, clean, noised, log_snr.float(), mixing=process)
    want = gidd_objective(logits.float().double(), clean, noised, log_snr.float().double(), mixing=process)
    assert {t.dtype for t in got} == {torch.float32}
    assert {t.dtype for t in want} == {torch.float64}
    assert bool((got.loss >= 0).all())
    assert bool((got.elbo >= 0).all())
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-4, atol=2e-6)
    got.loss.sum().backward()
    assert single.grad is not None
    assert bool(single.grad.isfinite().all())
    sums = single.grad.double().sum(-1).abs()
    assert bool((sums <= 1e-5 * (1 + single.grad.double().abs().sum(-1))).all())


def test_the_released_precision_target_holds_at_the_real_vocabulary():
    """gidd.md 1.8: float32 within 1.1e-5 nats of the weighted bound of about 7 nats, V = 131072."""
    logits, clean, noised, log_snr = random_tokens(12, 131072, 3, seed=1)
    single = logits.float()
    got = gidd_objective(single, clean, noised, log_snr.float(), mixing=HybridMixing(131072, 3, 0.0)).elbo
    args = (single.double(), clean, noised, log_snr.float().double())
    want = gidd_objective(*args, mixing=HybridMixing(131072, 3, 0.0)).elbo
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=5e-5)


def test_a_perfect_copy_costs_nothing():
    x = torch.tensor([0, 1, 2, 4])
    logits = torch.full((4, 5), -1e4, dtype=torch.float64).scatter_(1, x[:, None], 1e4)
    for b in (-1000.0, 0.0, 1000.0):
        for z in (x, torch.roll(x, 1)):
            terms = gidd_objective(logits, x, z, f64(-3, 0, 2, 9), mixing=HybridMixing(5, 3, b))
            kept = z == x
            assert float(terms.loss[kept].abs().sum()) == 0 or b != -1000
            assert float(terms.kl.abs().max()) < 1e-12
            assert float(terms.itakura_saito[kept].abs().sum()) == 0


@settings(max_examples=60, deadline=None)
@given(b=st.floats(-30, 30), a=st.floats(0.05, 1), lam=st.floats(-9, 9), x=st.sampled_from([0, 1, 2, 4]))
def test_divergences_are_non_negative_and_is_vanishes_at_the_mask(b, a, lam, x):
    z = torch.arange(5)
    terms = gidd_objective(
        LOGITS.expand(5, 5), torch.full((5,), x), z, torch.full((5,), lam).double(), mixing=HybridMixing(5, 3, b, a)
    )
    assert bool((terms.kl >= -1e-15).all())
    assert bool((terms.itakura_saito >= 0).all())
    assert terms.itakura_saito[3] == 0
    assert float(terms.loss.max()) < math.inf


def test_is_weight_touches_the_loss_alone_and_the_schedule_the_elbo_alone():
    args = (LOGITS.expand(5, 5), torch.full((5,), 2), torch.arange(5), f64(1, 1, 1, 1, 1))
    process = HybridMixing(5, 3, 0.0)
    one, none = (gidd_objective(*args, mixing=process, is_weight=w) for w in (1.0, 0.0))
    torch.testing.assert_close(none.loss, one.weight * one.kl)
    torch.testing.assert_close(none.elbo, one.elbo)
    flat = gidd_objective(*args, mixing=process.with_schedule(UniformSchedule(-9, 9)))
    torch.testing.assert_close(flat.loss, one.loss)
    torch.testing.assert_close(flat.elbo, 18 * one.loss)


def test_mask_and_padding_logits_change_nothing_and_get_no_gradient():
    logits, clean, noised, log_snr = random_tokens(30, 17, 5, seed=7)
    process = HybridMixing(17, 5, 0.0)
    want = gidd_objective(logits, clean, noised, log_snr, mixing=process).loss
    padded = torch.cat([logits, torch.full((30, 3), 50.0, dtype=torch.float64)], dim=1)
    padded[:, 5] = 80.0
    padded.requires_grad_()
    got = gidd_objective(padded, clean, noised, log_snr, mixing=process).loss
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    got.sum().backward()
    assert padded.grad is not None
    assert float(padded.grad[:, [5, 17, 18, 19]].abs().max()) == 0


@pytest.mark.parametrize("weighting", ["surrogate", "elbo", "flat"])
@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1.5])
def test_weights_times_divergences_are_what_is_minimised(weighting, shift):
    """Without the Itakura-Saito term; the bound, which always has it, counts it as it counts KL."""
    process = HybridMixing(12, 3, shift)
    logits, clean, noised, log_snr = random_tokens(200, 12, 3, seed=6, masked=shift < 0)
    settings = objective_config(weighting=weighting, itakura_saito_weight=0.0)
    terms = gidd_objective(logits, clean, noised, log_snr, mixing=process, weighting=build_weighting(settings))
    nats = terms.kl + terms.itakura_saito if weighting == "elbo" else terms.kl
    if weighting == "flat":
        real = logits.index_fill(-1, torch.tensor([3]), -1e30)
        nats = -torch.log_softmax(real, dim=-1).gather(-1, clean[..., None])[..., 0]
    weights = loss_weights(clean, noised, log_snr, process=process, weighting=build_weighting(settings))
    torch.testing.assert_close(weights * nats, terms.minimised, rtol=1e-9, atol=1e-12)


def test_shapes_that_do_not_agree_are_refused():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    logits, lam, process = torch.zeros(2, 3, 5), torch.zeros(2, 3), HybridMixing(5, 3, 0.0)
    with (
        shapes.unchecked(),
        pytest.raises(ValueError, match=r"noised and log_snr must have the shape of clean, \(2, 3\)"),
    ):
        gidd_objective(logits, ids, ids, torch.zeros(2), mixing=process)
    with pytest.raises(ValueError, match=r"logits must have shape \(2, 3, 5\)"):
        gidd_objective(torch.zeros(2, 3, 4), ids, ids, lam, mixing=process)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-5)])
@pytest.mark.parametrize("sign", [1, -1])
def test_small_arguments_of_the_itakura_saito_term_lose_no_digits(dtype, tolerance, sign):
    """Compare with 50 digits: e - log1p(e) is about e^2 / 2, so a plain difference would lose all of them."""
    sizes = [*(10.0**power for power in range(-12, 0)), 0.0199, 0.0201]
    arguments = sign * torch.tensor(sizes, dtype=dtype)
    found = _minus_log1p(arguments, torch.log1p(arguments))
    for argument, value in zip(arguments.tolist(), found.tolist(), strict=True):
        with localcontext() as context:
            context.prec = 50
            exact = Decimal(argument) - (1 + Decimal(argument)).ln()
        assert value == pytest.approx(float(exact), rel=tolerance), argument
