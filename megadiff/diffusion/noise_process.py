"""The noise process: a uniform real token with probability u, else the mask; all that follows from u(lambda).

At log-SNR lambda a token is kept with probability alpha and noised with probability beta,

    q(z | x) = alpha 1[z = x] + beta pi_z,    pi_v = u / N for the N = V - 1 real tokens,  pi_m = 1 - u

A process is its u as a function of lambda (`processes.NoiseLaw`) over a vocabulary, with the schedule that lambda is
drawn by. With l = logit(u) and a = dl / dlambda, u' = a u (1 - u), and everything below follows from l and a. V counts
the mask m, whatever its id is. Source: arXiv:2512.10858, sections 2.2 and 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadiff.config.registry import call, is_own, naming
from megadiff.diffusion import exact, schedules
from megadiff.diffusion.config import PROCESSES, NoiseConfig, ScheduledNoise
from megadiff.diffusion.processes import NoiseLaw
from megadiff.diffusion.schedules import LINEAR, SCHEDULES, NoiseSchedule
from megadiff.diffusion.shapes import Float, Int
from megadiff.errors import ConfigError

FloatArray = npt.NDArray[np.float64]

_CLEAN_LOG_SNR = 9.0
"""Log-SNR at which a sampler ends at the earliest: next to no noise is left there."""


@dataclass(frozen=True)
class NoiseProcess:
    """The forward process over V tokens, one of which is the mask.

    Args:
        vocab_size: V, the mask included; entries that only pad the vocabulary are not counted.
        mask_id: id of the mask, in [0, V).
        law: u(lambda).
        schedule: distribution of lambda in training; its density divides the bound's integrand. The default is the
            paper's linear schedule on [-9, 9].

    Raises:
        ConfigError: a mask outside the vocabulary.
    """

    vocab_size: int
    mask_id: int
    law: NoiseLaw
    schedule: NoiseSchedule = LINEAR

    def __post_init__(self) -> None:
        if self.vocab_size < 2 or not 0 <= self.mask_id < self.vocab_size:
            raise ConfigError(
                f"the mask must be one of 2 or more vocabulary entries, got mask id {self.mask_id} of {self.vocab_size}"
            )

    def with_schedule(self, schedule: NoiseSchedule) -> NoiseProcess:
        """Return the same noise with its levels drawn otherwise."""
        return replace(self, schedule=schedule)

    @property
    def is_masked_limit(self) -> bool:
        """Whether noise is masks alone (u = 0 at every log-SNR)."""
        return self.law.is_masked_limit

    @property
    def is_uniform_limit(self) -> bool:
        """Whether noise is random tokens alone (u = 1 at every log-SNR)."""
        return self.law.is_uniform_limit

    @property
    def num_real(self) -> int:
        """N = V - 1, the number of tokens that are not the mask."""
        return self.vocab_size - 1

    @property
    def sampling_range(self) -> tuple[float, float]:
        """Lowest and highest log-SNR of sampling.

        It is the schedule's range, but goes on to 9 where training ends at a level that still holds noise.
        """
        return self.schedule.min_log_snr, max(_CLEAN_LOG_SNR, self.schedule.max_log_snr)

    def logit_u(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return log(u / (1 - u)) in the dtype of `log_snr`."""
        return self._of_law(self.law.logit_u, log_snr)

    def dlogit_u(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"] | float:
        """Return a = d logit_u / d lambda; the process exists where a (1 - u) <= 1."""
        return self._of_law(self.law.dlogit_u, log_snr)

    def log_u(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return the logarithm of the uniform share, by logsigmoid: finite where u itself underflows."""
        return logsigmoid(self.logit_u(log_snr))

    def uniform_prob(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return u, the uniform share of the noise, in [0, 1]."""
        return torch.sigmoid(self.logit_u(log_snr))

    def mask_prob(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return 1 - u, the mask share of the noise, without the subtraction."""
        return torch.sigmoid(-self.logit_u(log_snr))

    def exact_uniform_prob(self, log_snr: npt.ArrayLike) -> FloatArray:
        """Return u in float64 with the same bits on every machine, for drawing noise."""
        return exact.sigmoid(self.law.logit_u(np.asarray(log_snr, dtype=np.float64), exact))

    def log_rho(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return log(alpha / c) = lambda + log N - log u: the signal of a token over its noise, c = beta u / N."""
        return log_snr + math.log(self.num_real) - self.log_u(log_snr)

    def pi(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes V"]:
        """Return pi_lambda over the vocabulary; sums to 1."""
        return self._spread(self.uniform_prob(log_snr) / self.num_real, self.mask_prob(log_snr))

    def pi_prime(self, log_snr: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes V"]:
        """Return d pi / d lambda; sums to 0: a u (1 - u) / N on real tokens, -a u (1 - u) on the mask."""
        change = self.dlogit_u(log_snr) * self.uniform_prob(log_snr) * self.mask_prob(log_snr)
        return self._spread(change / self.num_real, -change)

    def pi_at(self, log_snr: Float[Tensor, "*#axes"], tokens: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
        """Return pi_lambda at the given ids."""
        real = self.uniform_prob(log_snr) / self.num_real
        return torch.where(tokens == self.mask_id, self.mask_prob(log_snr), real)

    def weight(
        self, log_snr: Float[Tensor, "*#axes"], clean: Int[Tensor, "*#axes"], noised: Int[Tensor, "*#axes"]
    ) -> Float[Tensor, "*axes"]:
        """Return the weight w = (pi_z - pi'_z) / (pi_z + e^lambda 1[z = x]) of a token's divergence in the bound.

            z = m               1 + a u
            z real, z != x      1 - a (1 - u)
            z = x               u (1 - a (1 - u)) / (u + N e^lambda)

        In the closed forms nothing cancels and nothing needs a floor (the released code clips the denominator at
        1e-8, which spoils hybrid noise at V = 131072). In the masked limit only masks weigh, w = 1; under uniform
        noise w = 1 except at z = x, 1 / (1 + N e^lambda). Always 0 <= w <= 1 + a, and E_z[w] = beta.

        Args:
            log_snr: lambda.
            clean, noised: ids x and z.

        Source: arXiv:2512.10858, proposition 1.
        """
        dtype = log_snr.dtype
        if self.is_masked_limit:  # the formulas keep (1 - a) where z is real, but no token can be uniform noise
            shape = torch.broadcast_shapes(log_snr.shape, clean.shape, noised.shape)
            return (noised == self.mask_id).to(dtype).expand(shape)
        if self.law.in_float64:
            log_snr = log_snr.double()
        u, slope = self.uniform_prob(log_snr), self.dlogit_u(log_snr)
        uniform = (1.0 - slope) + slope * u
        kept = u * uniform / (u + self.num_real * torch.exp(log_snr))
        real = torch.where(noised == clean, kept, uniform)
        return torch.where(noised == self.mask_id, 1.0 + slope * u, real).to(dtype)

    def marginal(self, probs: Float[Tensor, "*#axes V"], log_snr: Float[Tensor, "*#axes"]) -> Float[Tensor, "*axes V"]:
        """Return q_lambda = alpha probs + beta pi for clean-token probabilities."""
        keep, noise = schedules.alpha(log_snr).unsqueeze(-1), schedules.beta(log_snr).unsqueeze(-1)
        return keep * probs + noise * self.pi(log_snr)

    def _of_law(self, function: Callable[[Any, Any], Any], log_snr: Float[Tensor, " ..."]) -> Any:
        if not self.law.in_float64:
            return function(log_snr, torch)
        found = function(log_snr.double(), torch)
        return found.to(log_snr.dtype) if isinstance(found, Tensor) else found

    def _spread(self, real: Float[Tensor, "*axes"], mask: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes V"]:
        is_mask = torch.arange(self.vocab_size, device=real.device) == self.mask_id
        return torch.where(is_mask, mask.unsqueeze(-1), real.unsqueeze(-1))


def build_process(settings: NoiseConfig, *, vocab_size: int, mask_id: int) -> NoiseProcess:
    """Return the noise process of a configuration over a tokenizer's vocabulary.

    Raises:
        ConfigError: the member of the family lacks a part of the contract.
    """
    member = PROCESSES.member(settings.process)
    build = getattr(member, "build", None)
    law = call(member, "build", settings) if build is not None else None
    if not isinstance(law, NoiseLaw):
        raise ConfigError(
            f"noise.process: `{settings.process}` must have a function `build(settings)` that returns a "
            f"megadiff.diffusion.processes.NoiseLaw, found {'none' if build is None else type(law).__name__}"
        )
    process = NoiseProcess(vocab_size, mask_id, law, build_schedule(settings))
    if not is_own(member):
        _try_law(member, process)
    return process


def _try_law(member: ModuleType, process: NoiseProcess) -> None:
    """Refuse a law of the user's own that fails at noise levels of the run, which would be found in a step only.

    Raises:
        ConfigError: a method raises, or gives something that is not finite or has another shape than the noise levels.
    """
    low, high = process.schedule.min_log_snr, process.schedule.max_log_snr
    levels = np.linspace(low, high, 9)
    for name, shapes in (("logit_u", [levels.shape]), ("dlogit_u", [levels.shape, ()])):
        for log_snr, functions in ((torch.from_numpy(levels), torch), (levels, exact)):
            with naming(member, name):
                found = np.asarray(getattr(process.law, name)(log_snr, functions), dtype=np.float64)
            if found.shape not in shapes or not np.isfinite(found).all():
                shown = f"shape {found.shape}" if found.shape not in shapes else f"{found[~np.isfinite(found)][0]}"
                raise ConfigError(
                    f"`{name}` of the module {member.__name__} must return finite numbers in the shape of `log_snr`, "
                    f"here {levels.shape} from {low:g} to {high:g}, found {shown}; correct it"
                )


def build_schedule(settings: NoiseConfig) -> NoiseSchedule:
    """Return the schedule of a configuration: the process's own, or the one that `noise.schedule` names.

    Raises:
        ConfigError: the process neither has a schedule nor takes one.
    """
    member = PROCESSES.member(settings.process)
    if hasattr(member, "build_schedule"):
        return call(member, "build_schedule", settings)
    if not isinstance(settings, ScheduledNoise):
        raise ConfigError(
            f"noise.process: the `Settings` of `{settings.process}` must derive from "
            "megadiff.diffusion.config.ScheduledNoise, or the module have a function `build_schedule(settings)`"
        )
    return SCHEDULES[settings.schedule](settings.min_log_snr, settings.max_log_snr)
