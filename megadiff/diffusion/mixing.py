"""Hybrid noise of arXiv:2512.10858 in one call."""

from __future__ import annotations

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.processes.gidd_snr import GiddSnr


def HybridMixing(vocab_size: int, mask_id: int, shift: float, scale: float = 1.0) -> NoiseProcess:  # noqa: N802  a public name
    """Return the noise process with u = sigmoid(scale lambda + shift) and the paper's schedule.

    Args:
        vocab_size: V, the mask included.
        mask_id: id of the mask, in [0, V).
        shift: b; -1000 is pure masking, 1000 purely uniform noise.
        scale: a in (0, 1].

    Raises:
        ConfigError: a scale outside its range, or a mask outside the vocabulary.
    """
    return NoiseProcess(vocab_size, mask_id, GiddSnr(shift, scale))
