"""Next-token prediction with causal attention: the autoregressive control of a diffusion model on the same data."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from megadiff.errors import ConfigError
from megadiff.methods import Method, MethodConfig, MethodContext

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from megadiff.data.config import StepBatch
    from megadiff.diffusion.noising import NoisedBatch
    from megadiff.eval.likelihood import BoundSettings, Estimator
    from megadiff.eval.validation import EvalTask
    from megadiff.loss.lm_head import LossOutput, VocabShard
    from megadiff.parallel.attention_pattern import AttentionPattern
    from megadiff.parallel.objective import DeviceBatch, NextTokenObjective
    from megadiff.run.config import RunConfig
    from megadiff.sampling.sampler import Sampler


def check(config: RunConfig) -> None:
    """Refuse text samples during training, and a model that moves the targets as this method does itself.

    Raises:
        ConfigError: with what to set.
    """
    if config.model.alignment != "same":
        raise ConfigError(
            f"model.alignment is {config.model.alignment}, but method.name=next_token moves the tokens itself, behind "
            "a start token; set model.alignment to same (a run with method.name=adaptation may begin with its weights "
            "under either)"
        )
    if config.eval.samples:
        raise ConfigError(
            f"eval.samples is {config.eval.samples}, but an autoregressive control (method.name=next_token) is not "
            "sampled; set eval.samples to 0"
        )


def build(settings: MethodConfig, context: MethodContext) -> NextToken:
    """Return the method, which has no settings of its own."""
    del settings
    return NextToken(context)


class NextToken(Method):
    """Cross-entropy of every token given those before it; a start token stands before each sequence.

    Noise, weighting and conditioning of the run have no effect. The tokens that are predicted are those that a
    diffusion model of the same run is measured on, so bits per byte compare.
    """

    adds_start_token = True

    @property
    def description(self) -> str:
        """Sentence about the model."""
        return "An autoregressive language model, the control of a diffusion model of the same shape and data."

    @cached_property
    def _start_id(self) -> int:
        from megadiff.diffusion.next_token import start_id

        return start_id(self.context.tokenizer)

    @cached_property
    def _objective(self) -> NextTokenObjective:
        from megadiff.parallel.objective import NextTokenObjective

        return NextTokenObjective(self.process, self.context.loss_kernel)

    def batch(
        self,
        clean: npt.NDArray[np.int64],
        sample_index: list[int],
        step_batch: StepBatch,
        predicted: npt.NDArray[np.bool_] | None = None,
        documents: npt.NDArray[np.int64] | None = None,
    ) -> NoisedBatch:
        """Shift the sequences, or each of their documents, by one token (`diffusion.next_token`)."""
        del sample_index, step_batch
        from megadiff.diffusion.next_token import next_token_batch

        return next_token_batch(clean, start_id=self._start_id, predicted=predicted, documents=documents)

    def loss_tokens(self, batch: NoisedBatch) -> Tensor | None:
        """Return the tokens that are predicted, or None for all."""
        return self._objective.loss_tokens(batch)

    def attention(self, batch: NoisedBatch) -> AttentionPattern:
        """Return causal attention, within documents where sequences consist of several."""
        return self._objective.attention(batch)

    def loss_weights(self, batch: NoisedBatch) -> Tensor:
        """Return 1 for every token that is predicted."""
        return batch.is_noisy.float()

    def loss(self, hidden: Tensor, lm_head_weight: Tensor, batch: DeviceBatch, shard: VocabShard) -> LossOutput:
        """Return the cross-entropy of the next token (`parallel.objective.NextTokenObjective`)."""
        return self._objective.loss(hidden, lm_head_weight, batch, shard)

    def prompted_attention(self, prompt_lengths: Tensor, length: int) -> AttentionPattern:
        """Return causal attention, whatever the prompt."""
        from megadiff.parallel.attention_pattern import AttentionPattern

        return AttentionPattern.causal(len(prompt_lengths), length)

    def validation(self, *, num_noise_levels: int) -> EvalTask:
        """Return the exact likelihood, on the same tokens and under the same keys as a diffusion bound."""
        del num_noise_levels
        from megadiff.diffusion.next_token import next_token_batch
        from megadiff.eval.validation import EvalTask

        def batch(
            clean: npt.NDArray[np.int64],
            index: npt.NDArray[np.int64],
            level: int,
            predicted: npt.NDArray[np.bool_] | None = None,
            documents: npt.NDArray[np.int64] | None = None,
        ) -> NoisedBatch:
            del index, level
            return next_token_batch(clean, start_id=self._start_id, predicted=predicted, documents=documents)

        return EvalTask(objective=self._objective, batch=batch, num_noise_levels=1)

    def estimator(self, settings: BoundSettings) -> Estimator:
        """Return the exact likelihood of texts."""
        from megadiff.eval.likelihood import ExactEstimator

        return ExactEstimator(settings, self.process, start_id=self._start_id)

    def sampler(self) -> Sampler:
        """Refuse: the control is measured, not sampled.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "this model is an autoregressive control (method.name is next_token), which is measured but not sampled; "
            "use a diffusion model (in the harness, leave out tasks whose output_type is generate_until)"
        )

    def export_config(self) -> dict[str, Any]:
        """Return the keys of a causal model."""
        return {"is_causal": True, "prompt_attention": self.context.conditioning.trained_prompt_attention}
