"""Denoising by a model that was autoregressive: it begins with causal attention and may keep predicting next tokens.

It takes a model that predicted next tokens to a denoiser by the published ways, each an option: outputs that still
predict the token after each position (`model.alignment: shifted`, as in arXiv:2410.17891 and Dream), attention that
goes from causal to full (arXiv:2410.17891, section 3.3), and a share of sequences that remain autoregressive, whose
loss is added with a weight. What comes out is a model of the method `gidd`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import Field

from megadiff.errors import ConfigError
from megadiff.methods import MethodConfig, MethodContext, gidd

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from megadiff.data.config import StepBatch
    from megadiff.diffusion.noising import NoisedBatch
    from megadiff.loss.lm_head import LossOutput, VocabShard
    from megadiff.parallel.attention_pattern import AttentionPattern
    from megadiff.parallel.objective import DeviceBatch, NextTokenObjective
    from megadiff.run.config import RunConfig


class Settings(MethodConfig):
    """Settings of the way from autoregressive to diffusion."""

    anneal_steps: int = Field(default=0, ge=0)
    """Steps over which attention goes from causal to full: in step s, counted from 0, the first 1 - s / anneal_steps of
    each sequence attends to what comes before alone, and the rest to everything; 0 for full attention at once."""

    next_token_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a sequence is trained to predict next tokens, without noise and with causal attention."""

    next_token_weight: float = Field(default=1.0, ge=0)
    """Factor of those sequences' loss, beside that of the others."""


def check(config: RunConfig) -> None:
    """Refuse what the options do not go with.

    Raises:
        ConfigError: with what to set.
    """
    gidd.check(config)
    settings, conditioning = config.method, config.conditioning
    assert isinstance(settings, Settings)
    if settings.next_token_fraction and config.model.alignment != "shifted":
        raise ConfigError(
            f"method.next_token_fraction is {settings.next_token_fraction:g}, but model.alignment is "
            f"{config.model.alignment}; a model that is to predict next tokens too needs model.alignment=shifted"
        )
    if (settings.next_token_fraction or settings.anneal_steps) and conditioning.trained_prompt_attention == "block":
        raise ConfigError(
            "method.name=adaptation attends causally at times, but conditioning.prompt_attention is block; set it to "
            "causal, or conditioning.prompt to 0"
        )


def advice(config: RunConfig) -> list[str]:
    """Return a warning if the run ends before attention is full; none otherwise."""
    settings = config.method
    assert isinstance(settings, Settings)
    if settings.anneal_steps <= config.steps:
        return []
    return [
        f"method.anneal_steps is {settings.anneal_steps:,}, but the run ends after {config.steps:,} steps "
        f"({config.length_setting}): the model would never be trained with full attention, with which it is evaluated, "
        "sampled and exported; lower method.anneal_steps, or lengthen the run"
    ]


def build(settings: Settings, context: MethodContext) -> Adaptation:
    """Return the method."""
    return Adaptation(settings, context)


class Adaptation(gidd.Gidd):
    """Denoising of a model that was autoregressive; a sequence whose whole length is a causal prefix still is."""

    def __init__(self, settings: Settings, context: MethodContext) -> None:
        super().__init__(context)
        self.settings = settings

    @property
    def description(self) -> str:
        """Sentence about the model."""
        return f"{super().description} It was made from an autoregressive model."

    def batch(self, clean: npt.NDArray[np.int64], sample_index: list[int], step_batch: StepBatch) -> NoisedBatch:
        """Noise the sequences, but for those that predict next tokens, and shorten the causal part step by step."""
        import torch

        noised = super().batch(clean, sample_index, step_batch)
        causal = self._causal_length(clean.shape[1], step_batch.step)
        noised = noised._replace(prompt_length=noised.prompt_length.clamp(min=causal))
        chosen = self._chosen(sample_index)
        return _without_noise(noised, torch.from_numpy(clean), chosen, self.process) if chosen.any() else noised

    def _causal_length(self, length: int, step: int) -> int:
        """Return the number of leading tokens with causal attention, less than all: the last token sees them anyway."""
        steps = self.settings.anneal_steps
        return min(length - 1, length * (steps - step) // steps) if step < steps else 0

    def _chosen(self, sample_index: list[int]) -> Tensor:
        """Return which samples predict next tokens, [B] bool: coins keyed by the seed and the sample alone."""
        import numpy as np
        import torch

        from megadiff.diffusion.philox import Stream, threshold

        samples = np.asarray(sample_index, dtype=np.int64)
        coins = Stream(self.context.seed, "train/next_token").words(samples, 1, count=1)[0][:, 0]
        return torch.from_numpy(coins < threshold(np.array([self.settings.next_token_fraction])))

    @cached_property
    def _next_token(self) -> NextTokenObjective:
        from megadiff.parallel.objective import NextTokenObjective

        return NextTokenObjective(self.process, self.context.loss_kernel)

    def attention(self, batch: NoisedBatch) -> AttentionPattern:
        """Return the causal parts of the sequences; the rest attends to everything."""
        from megadiff.parallel.attention_pattern import AttentionPattern

        if not (self.settings.anneal_steps or self.settings.next_token_fraction):
            return super().attention(batch)  # a prefix is a prompt, which may attend to all of itself
        return AttentionPattern.prefix(batch.prompt_length, is_causal=True)

    def loss_tokens(self, batch: NoisedBatch) -> Tensor | None:
        """Return the noisy tokens of the denoised sequences, then all but the first of those that predict next ones."""
        import torch

        is_next = _predicts_next(batch.prompt_length, batch.noised.shape[1])
        if not is_next.any():
            return super().loss_tokens(batch)
        denoised = super().loss_tokens(batch._replace(is_noisy=batch.is_noisy & ~is_next[:, None]))
        assert denoised is not None  # as the first token of the others is left out
        others = (batch.is_noisy & is_next[:, None]).t().reshape(-1).nonzero().squeeze(-1)
        return torch.cat((denoised, others))

    def loss_weights(self, batch: NoisedBatch) -> Tensor:
        """Return the weighting's weights, and `next_token_weight` for tokens of the other sequences."""
        is_next = _predicts_next(batch.prompt_length, batch.noised.shape[1])
        weights = super().loss_weights(batch)
        weights[is_next] = self.settings.next_token_weight * batch.is_noisy[is_next].to(weights.dtype)
        return weights

    def loss(self, hidden: Tensor, lm_head_weight: Tensor, batch: DeviceBatch, shard: VocabShard) -> LossOutput:
        """Return the weighting's loss and the bound's terms, and for the other sequences the cross-entropy."""
        length = batch.sequences.noised.shape[1]
        count = (length - 1) * int(_predicts_next(batch.attention.prefix_lengths, length).sum())
        if not count:
            return super().loss(hidden, lm_head_weight, batch, shard)
        assert batch.active_indices is not None
        denoised, others = batch.active_indices[:-count], batch.active_indices[-count:]
        one = super().loss(hidden, lm_head_weight, batch._replace(active_indices=denoised), shard)
        other = self._next_token.loss(hidden, lm_head_weight, batch._replace(active_indices=others), shard)
        weight, terms = self.settings.next_token_weight, other.terms
        terms = terms._replace(loss=weight * terms.loss, minimised=weight * terms.minimised)
        return one._replace(
            loss=one.loss + weight * other.loss,
            terms=type(terms)(*(a + b for a, b in zip(one.terms, terms, strict=True))),
            head_tokens=batch.active_indices.numel(),
        )


def _predicts_next(prefix_lengths: Tensor, length: int) -> Tensor:
    """Return which sequences predict next tokens, [B] bool; no other has a prefix of its whole length."""
    return prefix_lengths == length


def _without_noise(noised: NoisedBatch, clean: Tensor, chosen: Tensor, process: Any) -> NoisedBatch:
    """Return a batch whose `chosen` sequences [B] are clean, with a loss at every token but the first."""
    import torch

    from megadiff.diffusion.conditioning import NoisePattern

    length, rows = clean.shape[1], chosen[:, None]
    tokens = clean.to(noised.noised.dtype)
    has_loss = (torch.arange(length) > 0).expand_as(rows.expand(-1, length))
    return noised._replace(
        noised=torch.where(rows, tokens, noised.noised),
        clean=torch.where(rows, tokens, noised.clean),
        log_snr=noised.log_snr.masked_fill(rows, process.schedule.max_log_snr),
        is_noisy=torch.where(rows, has_loss, noised.is_noisy),
        prompt_length=noised.prompt_length.masked_fill(chosen, length),
        pattern=noised.pattern.masked_fill(chosen, int(NoisePattern.NEXT_TOKEN)),
        source=torch.where(rows, torch.arange(length), noised.source),
    )
