"""Noise processes (a family): how much of the noise is uniform at each log-SNR.

A file's name is its name under `noise.process`; a dotted path (`my_package.my_noise`) names a file of your own. A
member has `Settings`, a section of the configuration that derives from `NoiseConfig` or `ScheduledNoise`, and
`build(settings)`, which returns its `NoiseLaw`; `NoiseProcess` derives marginals, weights, drawing and sampling from
the law. A member whose noise levels are not drawn by `noise.schedule` also has `build_schedule(settings)`.
`megadiff.testing.check_process` is the contract. Members stay quick to import: they import torch inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar


class NoiseLaw(ABC):
    """Share u of uniform tokens in the noise, as a function of the log-SNR lambda.

    The law is written once. Each method takes the elementary functions that it is to use: the module `torch` for
    tensors, or `megadiff.diffusion.exact` (exp, log, sqrt, sigmoid, atan) for float64 arrays whose bits must be the
    same on every machine, from which noise is drawn. A law is frozen and hashable, as a frozen dataclass is.
    """

    in_float64: ClassVar[bool] = False
    """Whether tensors are computed in float64 whatever their dtype, where float32 would lose digits."""

    @property
    def is_masked_limit(self) -> bool:
        """Whether noise is masks alone (u = 0 at every log-SNR)."""
        return False

    @property
    def is_uniform_limit(self) -> bool:
        """Whether noise is random tokens alone (u = 1 at every log-SNR)."""
        return False

    @abstractmethod
    def logit_u(self, log_snr: Any, functions: Any) -> Any:
        """Return the log odds of uniform noise, log(u / (1 - u)), finite and in the shape of `log_snr`.

        Args:
            log_snr: lambda, a tensor or a float64 array, within [-50, 50].
            functions: `torch` or `megadiff.diffusion.exact`.
        """

    @abstractmethod
    def dlogit_u(self, log_snr: Any, functions: Any) -> Any:
        """Return a = d logit_u / d lambda, >= 0, as a number or in the shape of `log_snr`.

        The process exists where a (1 - u) <= 1: otherwise uniform tokens would turn into masks at a negative rate.
        """
