"""What a model of known predictions is worth, without Monte Carlo."""

from __future__ import annotations

import math

import numpy as np


def blind_model(shift: float, vocab_size: int) -> tuple[float, float]:
    """(elbo, loss) of the uniform prediction, by Gauss-Legendre quadrature over log-SNR in [-9, 9].

    A noised token is the mask, the clean token, or one of N - 1 others, so three cases make the whole expectation.
    """
    points, weights = np.polynomial.legendre.leggauss(400)
    log_snr, weights = 9.0 * points, 9.0 * weights
    real = vocab_size - 1
    alpha, beta = 1 / (1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr))
    share = np.exp(-np.logaddexp(0.0, -(log_snr + shift)))
    q_clean, q_other, q_mask = alpha + beta * share / real, beta * share / real, beta * (1 - share)
    predicted = alpha / real + beta * share / real
    with np.errstate(divide="ignore", invalid="ignore"):
        log_other = np.where(q_other > 0, np.log(q_other / predicted), 0.0)
    log_clean = np.log(q_clean / predicted)
    kl = q_clean * log_clean + (real - 1) * q_other * log_other
    is_clean, is_other = np.expm1(log_clean) - log_clean, np.expm1(log_other) - log_other
    weight_clean = share**2 / (share + real * np.exp(log_snr)) if shift > -1000 else 0.0
    integrand = (
        q_mask * (1 + share) * kl
        + q_clean * weight_clean * (kl + is_clean)
        + (real - 1) * q_other * share * (kl + is_other)
    )
    mass = math.tanh(4.5)
    return float(weights @ integrand) / mass, float(weights @ (integrand * alpha * beta)) / mass
