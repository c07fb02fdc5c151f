"""A model's logits as a distribution over clean tokens: temperature, truncation, and draws from it."""

from __future__ import annotations

from megadiff.sampling.standalone import Prediction, draw_tokens, predict

__all__ = ["Prediction", "draw_tokens", "predict"]
