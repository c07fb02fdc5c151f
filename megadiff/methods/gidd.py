"""Denoising under the run's noise: the diffusion bound, its surrogate, or another weighting (arXiv:2512.10858)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from megadiff.diffusion.config import check_weighting_module
from megadiff.errors import ConfigError
from megadiff.methods import Method, MethodConfig, MethodContext

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from megadiff.data.config import StepBatch
    from megadiff.diffusion.config import ConditioningConfig
    from megadiff.diffusion.noise_process import NoiseProcess
    from megadiff.diffusion.noising import NoisedBatch
    from megadiff.eval.likelihood import BoundSettings, Estimator
    from megadiff.eval.validation import EvalTask
    from megadiff.loss.fused_lm_head import LossKernel
    from megadiff.loss.lm_head import LossOutput, VocabShard
    from megadiff.parallel.attention_pattern import AttentionPattern
    from megadiff.parallel.objective import DeviceBatch, DiffusionObjective
    from megadiff.run.config import RunConfig
    from megadiff.sampling.sampler import Sampler


def check(config: RunConfig) -> None:
    """Refuse a weighting without a loss, which would be found in the first step only, and prompts in packed sequences.

    Raises:
        ConfigError: with what is missing.
    """
    check_weighting_module(config.objective)
    attention = config.conditioning.trained_prompt_attention
    if config.data.packing and attention != "full":
        raise ConfigError(
            f"conditioning.prompt is {config.conditioning.prompt:g} with prompt_attention {attention}, but "
            "data.packing puts several conversations in a sequence, whose prompts cannot attend to "
            "themselves alone; set conditioning.prompt to 0, prompt_attention to full, or data.packing to false"
        )


def build(settings: MethodConfig, context: MethodContext) -> Gidd:
    """Return the method; it has no settings of its own, since noise, weighting and conditioning have sections."""
    del settings
    return Gidd(context)


class Gidd(Method):
    """Denoising with bidirectional attention; clean prompts attend to themselves as `conditioning` has it."""

    @property
    def description(self) -> str:
        """Sentence about the model."""
        return (
            f"A discrete diffusion language model ({self.context.noise.description} noise): it predicts clean tokens "
            "from noised ones, with attention in both directions, and writes by taking noise back step by step "
            "(arXiv:2512.10858)."
        )

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Range of the run's schedule."""
        return self.process.schedule.min_log_snr, self.process.schedule.max_log_snr

    def batch(
        self,
        clean: npt.NDArray[np.int64],
        sample_index: list[int],
        step_batch: StepBatch,
        predicted: npt.NDArray[np.bool_] | None = None,
        documents: npt.NDArray[np.int64] | None = None,
    ) -> NoisedBatch:
        """Condition and noise the sequences (`diffusion.noising.noise_batch`); what is not predicted stays clean.

        If the model is one whose prompts attend to themselves, what precedes the first predicted token is a prompt. All
        documents of a sequence have its noise level.
        """
        from megadiff.diffusion.noising import noise_batch

        batch = noise_batch(
            clean,
            seed=self.context.seed,
            sample_index=sample_index,
            process=self.process,
            conditioning=self.context.conditioning,
            stratified=self.context.objective.stratified,
            global_batch=step_batch.sequences,
            batch_origin=step_batch.first_sample,
            pad_id=self.context.tokenizer.pad_id,
        )
        return _conversations(batch, predicted, documents, self.process, self.context.conditioning)

    @cached_property
    def _objective(self) -> DiffusionObjective:
        from megadiff.diffusion.objective import build_weighting
        from megadiff.parallel.objective import DiffusionObjective

        return DiffusionObjective(
            self.process,
            build_weighting(self.context.objective),
            self.context.loss_kernel,
            is_causal_prompt=self._is_causal_prompt,
        )

    @property
    def _is_causal_prompt(self) -> bool:
        return self.context.conditioning.prompt_attention == "causal"

    def attention(self, batch: NoisedBatch) -> AttentionPattern:
        """Return full attention, except that a clean prompt attends to itself alone."""
        return self._objective.attention(batch)

    def loss_tokens(self, batch: NoisedBatch) -> Tensor | None:
        """Return the noisy tokens, and under masked noise only the masks."""
        return self._objective.loss_tokens(batch)

    def loss_weights(self, batch: NoisedBatch) -> Tensor:
        """Return the weights of the run's weighting (`diffusion.objective.loss_weights`), 0 at noise-free tokens."""
        from megadiff.diffusion.objective import build_weighting, loss_weights

        weighting = build_weighting(self.context.objective)
        weights = loss_weights(batch.clean, batch.noised, batch.log_snr, process=self.process, weighting=weighting)
        return weights * batch.is_noisy

    def loss(self, hidden: Tensor, lm_head_weight: Tensor, batch: DeviceBatch, shard: VocabShard) -> LossOutput:
        """Return the weighting's loss and the bound's terms (`parallel.objective.DiffusionObjective`)."""
        return self._objective.loss(hidden, lm_head_weight, batch, shard)

    def prompted_attention(self, prompt_lengths: Tensor, length: int) -> AttentionPattern:
        """Return full attention; a prompt attends to itself alone if the model was trained with prompts."""
        del length
        from megadiff.parallel.attention_pattern import AttentionPattern

        if self.context.conditioning.trained_prompt_attention == "full":
            return AttentionPattern.full(len(prompt_lengths))
        return AttentionPattern.prefix(prompt_lengths, is_causal=self._is_causal_prompt)

    def validation(self, *, num_noise_levels: int) -> EvalTask:
        """Return the bound under the run's noise with the linear schedule (`diffusion_bound`)."""
        return diffusion_bound(
            self.process,
            num_noise_levels=num_noise_levels,
            loss_kernel=self.context.loss_kernel,
            conditioning=self.context.conditioning,
        )

    def estimator(self, settings: BoundSettings) -> Estimator:
        """Return the estimator of the diffusion bound."""
        from megadiff.eval.likelihood import BoundEstimator

        return BoundEstimator(settings, self.process)

    def sampler(self) -> Sampler:
        """Return the samplers of `sampling.standalone` under the run's noise."""
        from megadiff.sampling.sampler import Sampler

        return Sampler(self.process)

    def export_config(self) -> dict[str, Any]:
        """Return the keys of a denoiser."""
        return {"is_causal": False, "prompt_attention": self.context.conditioning.trained_prompt_attention}


def _conversations(
    batch: NoisedBatch,
    predicted: npt.NDArray[np.bool_] | None,
    documents: npt.NDArray[np.int64] | None,
    process: NoiseProcess,
    conditioning: ConditioningConfig | None,
) -> NoisedBatch:
    """Return a batch in which what is not predicted is clean, and a prompt up to the first token that is predicted.

    It is a prompt only where training has prompts, which then attend to themselves alone. Text, whose tokens are all
    predicted, is returned as it is.
    """
    from megadiff.diffusion.noising import with_documents, with_given

    if predicted is None:
        return batch
    batch = with_given(batch, predicted, process)
    if documents is not None:
        return with_documents(batch, documents)
    if conditioning is None or conditioning.trained_prompt_attention == "full":
        return batch
    return batch._replace(prompt_length=batch.is_noisy.cumsum(1).eq(0).sum(1))


def diffusion_bound(
    process: NoiseProcess,
    *,
    num_noise_levels: int,
    loss_kernel: LossKernel | None = None,
    conditioning: ConditioningConfig | None = None,
) -> EvalTask:
    """Return the bound under the run's noise with the linear schedule, whatever schedule the run trains with.

    So it does not depend on the training schedule. Its p(log_snr) is the reference's, not renormalised for the
    truncation (`NoiseSchedule.density`): the figure is 1.000247 times the integral over [-9, 9]. A run that draws its
    levels from less than [-9, 9] (`gidd_time` does) is measured on all of it, so that runs compare.

    Args:
        process: the run's noise.
        num_noise_levels: number of stratified levels of each sequence.
        loss_kernel: implementation of LM head and loss; None for `fused_objective`.
        conditioning: the run's conditioning, by which prompts of conversations attend; None for full attention.
    """
    from megadiff.diffusion.noising import evaluation_noise
    from megadiff.diffusion.schedules import LINEAR, LinearSchedule
    from megadiff.eval.validation import SEED, EvalTask
    from megadiff.loss.fused_lm_head import fused_objective
    from megadiff.parallel.objective import DiffusionObjective

    trained = process.schedule
    linear = LinearSchedule(min(trained.min_log_snr, LINEAR.min_log_snr), max(trained.max_log_snr, LINEAR.max_log_snr))
    measured = process.with_schedule(linear)

    def batch(
        clean: npt.NDArray[np.int64],
        index: npt.NDArray[np.int64],
        level: int,
        predicted: npt.NDArray[np.bool_] | None = None,
        documents: npt.NDArray[np.int64] | None = None,
    ) -> NoisedBatch:
        noised = evaluation_noise(
            clean, seed=SEED, sequence_index=index, level=level, num_levels=num_noise_levels, process=measured
        )
        return _conversations(noised, predicted, documents, measured, conditioning)

    return EvalTask(
        objective=DiffusionObjective(
            measured,
            loss_kernel=loss_kernel or fused_objective,
            is_causal_prompt=conditioning is not None and conditioning.prompt_attention == "causal",
        ),
        batch=batch,
        num_noise_levels=num_noise_levels,
        log_snr_range=(linear.min_log_snr, linear.max_log_snr),
    )
