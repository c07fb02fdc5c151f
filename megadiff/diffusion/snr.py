"""The noise level: lambda = log_snr, the log signal-to-noise ratio.

alpha = sigmoid(lambda) is the probability that a token is kept and beta = sigmoid(-lambda) that it is noised (never
computed as 1 - alpha, which loses beta's digits when alpha is near 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def alpha(log_snr: Tensor) -> Tensor:
    """Return the probability that a token is kept: sigmoid(lambda)."""
    return torch.sigmoid(log_snr)


def beta(log_snr: Tensor) -> Tensor:
    """Return the probability that a token is noised: sigmoid(-lambda)."""
    return torch.sigmoid(-log_snr)
