"""The sampler of a trained denoiser: the samplers of `standalone` under the noise that the model was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.shapes import Int
from megadiff.sampling.standalone import Denoise, Generated, Prediction, Settings, draw_tokens, generate, predict

__all__ = ["Prediction", "draw_tokens", "predict"]


@dataclass(frozen=True)
class Sampler:
    """A sampler of new text. A training method may return a subclass with another `generate`."""

    process: NoiseProcess
    """The noise that the model was trained with."""

    def settings(self, max_new_tokens: int, **values: Any) -> Settings:
        """Return settings over the noise levels that the process can be sampled from.

        Args:
            max_new_tokens: number of tokens after the prompt.
            values: other fields of `standalone.Settings`.

        Raises:
            ValueError: a value is out of range.
        """
        low, high = self.process.sampling_range
        return Settings(max_new_tokens, min_log_snr=low, max_log_snr=high, **values)

    def generate(self, denoise: Denoise, prompt: Int[Tensor, "B P"], settings: Settings, **options: Any) -> Generated:
        """Generate text after prompts; options are those of `standalone.generate`."""
        return generate(denoise, prompt, settings, self.process, **options)
