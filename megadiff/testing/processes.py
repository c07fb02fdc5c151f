"""The contract of a noise process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from megadiff.diffusion import exact
from megadiff.diffusion.config import noise_config
from megadiff.diffusion.noise_process import NoiseProcess, build_process
from megadiff.diffusion.noising import evaluation_noise
from megadiff.diffusion.objective import gidd_objective
from megadiff.sampling.ancestral import reverse_posterior
from megadiff.sampling.standalone import reverse_kernel

VOCAB_SIZE, MASK_ID = 5, 3
_CLEAN = 2
_LEVELS = np.linspace(-50.0, 50.0, 401)
_LOGITS = torch.tensor([1.2, -0.4, 0.3, 2.5, -1.1], dtype=torch.float64)


def check_process(name: str, **settings: Any) -> NoiseProcess:
    """Check that a noise process keeps its contract, over a vocabulary of 5 tokens in float64.

    Checked are the law (finite, its slope the derivative of its log odds, the same for tensors and for exact arrays),
    rates that are nowhere negative, the weights of the bound by their definition and E_z[w] = beta, the telescoping of
    the bound for a constant prediction, the schedule (its quantile inverts the integral of its density), drawn tokens
    against the marginal, and a reverse step of the sampler against enumeration.

    Args:
        name: a member of `megadiff.diffusion.processes`, or the dotted path of a module of your own.
        settings: its keys of the section `noise`.

    Returns:
        The process that was checked.

    Raises:
        AssertionError: a rule does not hold; the message names it.
        ValidationError: the settings are wrong.
    """
    config = noise_config(process=name, **settings)
    process = build_process(config, vocab_size=VOCAB_SIZE, mask_id=MASK_ID)
    again = build_process(config, vocab_size=VOCAB_SIZE, mask_id=MASK_ID)
    assert (process, hash(process)) == (again, hash(again)), "a law must be hashable and equal to its like: freeze it"
    _check_law(process)
    _check_rates(process)
    _check_weights(process)
    _check_schedule(process)
    _check_telescoping(process)
    _check_reverse_step(process)
    _check_drawing(process)
    return process


def _check_law(process: NoiseProcess) -> None:
    law, levels = process.law, torch.from_numpy(_LEVELS)
    found = law.logit_u(_LEVELS, exact)
    assert np.shape(found) == _LEVELS.shape, "logit_u must have the shape of log_snr"
    assert np.isfinite(found).all(), "logit_u must be finite on [-50, 50]"
    some = law.logit_u(_LEVELS[1::3], exact)
    assert (some == found[1::3]).all(), "logit_u must give the same bits in any company: use `functions` alone"
    for dtype in (torch.float32, torch.float64):
        tensor = process.logit_u(levels.to(dtype))
        assert tensor.dtype == dtype, f"logit_u must keep the dtype {dtype}"
        loose = 1e-4 if dtype == torch.float32 else 1e-9
        close = np.isclose(tensor.double().numpy(), found, rtol=loose, atol=loose)
        assert close.all(), f"logit_u of tensors ({dtype}) and of exact arrays differ at log_snr {_LEVELS[~close][:3]}"
    u = process.exact_uniform_prob(_LEVELS)
    assert (not process.is_masked_limit) or (u < 1e-30).all(), "is_masked_limit, but u is not 0 everywhere"
    assert (not process.is_uniform_limit) or (u == 1).all(), "is_uniform_limit, but u is not 1 everywhere"
    if process.is_masked_limit:
        return  # u = 0 has no slope to be right or wrong
    low, high = _LEVELS[:-1], _LEVELS[1:]
    change = sum(
        weight * (law.dlogit_u(low + share * (high - low), exact) + np.zeros_like(low)) for share, weight in _gauss()
    ) * (high - low)
    close = np.isclose(change, np.diff(found), rtol=1e-6, atol=1e-8)
    assert close.all(), f"dlogit_u is not the derivative of logit_u at log_snr {low[~close][:3]}"


def _gauss(order: int = 12) -> list[tuple[float, float]]:
    """Return nodes and weights of Gauss-Legendre quadrature on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    return [(float(node + 1) / 2, float(weight) / 2) for node, weight in zip(nodes, weights, strict=True)]


def _nodes(low: float, high: float, panels: int = 200) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of composite Gauss-Legendre quadrature."""
    edges = np.linspace(low, high, panels + 1)
    width = np.diff(edges)
    nodes = [edges[:-1] + share * width for share, _ in _gauss()]
    weights = [weight * width for _, weight in _gauss()]
    return torch.from_numpy(np.concatenate(nodes)), torch.from_numpy(np.concatenate(weights))


def _check_rates(process: NoiseProcess) -> None:
    levels = torch.from_numpy(_LEVELS)
    slope = process.dlogit_u(levels) + torch.zeros_like(levels)
    assert bool((slope >= 0).all()), "dlogit_u must be at least 0: noise turns from uniform tokens to masks"
    rate = 1.0 - slope * process.mask_prob(levels)
    if not process.is_masked_limit:  # without a uniform token there is none to take back
        at = levels[rate < -1e-9]
        assert not len(at), f"a (1 - u) > 1, a negative rate, at log_snr {at[:3].tolist()}"
    ids = torch.arange(VOCAB_SIZE)
    for low, high in ((-9.0, -8.5), (-1.0, 1.0), (0.0, 8.0), (-9.0, 9.0)):
        at_t, at_s = (torch.full((VOCAB_SIZE,), level, dtype=torch.float64) for level in (low, high))
        keep = torch.sigmoid(at_t) / torch.sigmoid(at_s)
        fresh = torch.sigmoid(-at_t) * process.pi_at(at_t, ids) - keep * torch.sigmoid(-at_s) * process.pi_at(at_s, ids)
        assert bool((fresh >= -1e-12).all()), f"the forward kernel from log_snr {high} to {low} is negative"


def _check_weights(process: NoiseProcess) -> None:
    ids, clean = torch.arange(VOCAB_SIZE), torch.full((VOCAB_SIZE,), _CLEAN)
    one_hot = torch.eye(VOCAB_SIZE, dtype=torch.float64)[_CLEAN]
    for level in (-12.0, -9.0, -2.0, 0.0, 1.5, 5.0, 9.0):
        at = torch.full((VOCAB_SIZE,), level, dtype=torch.float64)
        pi, pi_prime = process.pi(at[:1])[0], process.pi_prime(at[:1])[0]
        weight = process.weight(at, clean, ids)
        top = weight * (pi + torch.exp(at) * (ids == clean))
        possible = (pi > 0) | (ids == clean)
        assert torch.allclose(top[possible], (pi - pi_prime)[possible], rtol=1e-7, atol=1e-12), (
            f"w is not (pi_z - pi'_z) / (pi_z + e^lambda 1[z = x]) at log_snr {level}"
        )
        q = process.marginal(one_hot[None], at[:1])[0]
        assert torch.allclose((q * weight).sum(), torch.sigmoid(-at[0]), rtol=1e-8), f"E_z[w] is not beta at {level}"


def _check_schedule(process: NoiseProcess) -> None:
    schedule = process.schedule
    low, high = schedule.min_log_snr, schedule.max_log_snr
    assert -50 <= low < high <= 50, f"the schedule's range {low} to {high} must lie within [-50, 50]"
    nodes, weights = _nodes(low, high)
    mass = float((weights * schedule.density(nodes)).sum())
    assert np.isclose(mass, schedule.mass, rtol=1e-7), f"the density integrates to {mass}, not to mass {schedule.mass}"
    shares = np.linspace(0, 1, 9)
    drawn = schedule.log_snr(shares)
    assert (np.diff(drawn) < 0).all(), "log_snr(u) must fall from max_log_snr at 0 to min_log_snr at 1"
    assert np.allclose(drawn[[0, -1]], [high, low], atol=1e-8), "log_snr(u) must run from max_log_snr to min_log_snr"
    for share, level in zip(shares[1:-1], drawn[1:-1], strict=True):
        nodes, weights = _nodes(float(level), high)
        above = float((weights * schedule.normalised_density(nodes)).sum())
        assert np.isclose(above, share, atol=1e-6), f"log_snr({share}) does not invert the integral of the density"


def _check_telescoping(process: NoiseProcess) -> None:
    low, high = process.schedule.min_log_snr, process.schedule.max_log_snr
    nodes, weights = _nodes(low, high)
    shape = (len(nodes), VOCAB_SIZE)
    ids = torch.arange(VOCAB_SIZE).expand(shape)
    levels = nodes.unsqueeze(-1).expand(shape)
    terms = gidd_objective(_LOGITS.expand(*shape, VOCAB_SIZE), torch.full(shape, _CLEAN), ids, levels, mixing=process)
    one_hot = torch.eye(VOCAB_SIZE, dtype=torch.float64)[_CLEAN]
    q = process.marginal(one_hot.expand(shape), nodes)
    found = float((weights * (q * terms.weight * (terms.kl + terms.itakura_saito)).sum(-1)).sum())
    wanted = _divergence(process, high) - _divergence(process, low)
    assert np.isclose(found, wanted, rtol=1e-7), (
        f"for a constant prediction the bound must be the difference of its ends, {wanted}, and is {found}"
    )


def _divergence(process: NoiseProcess, level: float) -> float:
    """Return KL(q || qhat) at a level for the constant prediction, by definition."""
    at = torch.tensor([level], dtype=torch.float64)
    one_hot = torch.eye(VOCAB_SIZE, dtype=torch.float64)[_CLEAN]
    q, q_hat = process.marginal(one_hot[None], at)[0], process.marginal(_predicted()[None], at)[0]
    some = q > 0
    return float((q[some] * torch.log(q[some] / q_hat[some])).sum())


def _predicted() -> Tensor:
    return _LOGITS.masked_fill(torch.arange(VOCAB_SIZE) == MASK_ID, -torch.inf).softmax(-1)


def _check_reverse_step(process: NoiseProcess) -> None:
    ids = torch.arange(VOCAB_SIZE)
    for low, high in ((-9.0, -7.0), (-1.0, 1.0), (1.0, 9.0)):
        at_t, at_s = (torch.full((VOCAB_SIZE,), level, dtype=torch.float64) for level in (low, high))
        keep, fresh = reverse_kernel(ids, at_t, at_s, process)
        forward = keep[:, None] * torch.eye(VOCAB_SIZE, dtype=torch.float64) + fresh[None, :]  # [z_s, z_t]
        assert torch.allclose(forward.sum(-1), torch.ones_like(keep)), "the forward kernel must sum to 1"
        at_cleaner = process.marginal(_predicted()[None], at_s[:1])[0]
        joint = at_cleaner[:, None] * forward  # [z_s, z_t]
        noisier = process.marginal(_predicted()[None], at_t[:1])[0]
        assert torch.allclose(joint.sum(0), noisier, rtol=1e-8, atol=1e-14), "two forward steps are not one"
        found = reverse_posterior(_predicted().expand(VOCAB_SIZE, -1), ids, low, high, mixing=process)  # [z_t, z_s]
        possible = noisier > 0
        wanted = (joint / noisier.clamp(min=1e-300)).t()
        assert torch.allclose(found[possible], wanted[possible], rtol=1e-7, atol=1e-12), (
            f"the reverse step from log_snr {low} to {high} is not Bayes' rule"
        )


def _check_drawing(process: NoiseProcess) -> None:
    count, length = 8, 4096
    clean = np.full((count, length), _CLEAN)
    for level in (1, 4, 6):
        sequences = evaluation_noise(
            clean, seed=0, sequence_index=np.arange(count), level=level, num_levels=8, process=process
        )
        q = process.marginal(
            torch.eye(VOCAB_SIZE, dtype=torch.float64)[_CLEAN].expand(count, -1), sequences.log_snr[:, 0].double()
        ).numpy()
        seen = np.bincount(sequences.noised.reshape(-1).numpy(), minlength=VOCAB_SIZE)
        error = np.sqrt((q * (1 - q)).sum(0) * length)
        far = np.abs(seen - q.sum(0) * length) > 5 * error + 1e-6
        assert not far.any(), f"tokens {np.flatnonzero(far)} are not drawn as often as the marginal has them"
