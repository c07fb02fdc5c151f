"""Sections of a run description about noise, conditioning and objective.

This module and the members of its families import no torch: reading a run description must stay instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from megadiff.config.registry import Family, check_arguments
from megadiff.config.section import Section
from megadiff.errors import ConfigError

PROCESSES = Family("megadiff.diffusion.processes", key="process")
"""The family of noise processes."""

WEIGHTINGS = Family("megadiff.diffusion.weightings", key="weighting")
"""The family of loss weightings."""

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "as_released": {"per_token_noise": 0.2, "prompt": 0.2, "pad_insertion": 0.0, "pad_insertion_law": "released"},
    "as_described": {"per_token_noise": 0.5, "prompt": 0.2, "pad_insertion": 0.2},
}
"""Settings of `conditioning.preset`.

`as_described` is the paper's text (section 4.1); `as_released` what its code does with default flags, where the value
meant for empty tokens is passed as the share of independent noise and no empty token is ever inserted.
"""


class NoiseConfig(Section):
    """`noise: {process: gidd_snr, shift: balanced}`: the noise process with its settings.

    `null` puts back the default of a key that a base file gave.
    """

    process: str = "gidd_snr"
    """Noise process: `gidd_snr`, hybrid noise in log-SNR (arXiv:2512.10858); `gidd_time`, its predecessor
    (arXiv:2503.04482), for comparison; or a dotted path to a module of your own."""

    @model_validator(mode="before")
    @classmethod
    def _null_takes_back(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {key: value for key, value in data.items() if value is not None or key not in known}

    @property
    def description(self) -> str:
        """Kind of noise, for people."""
        return self.process


class ScheduledNoise(NoiseConfig):
    """Settings of a process whose noise levels are drawn by one of the package's schedules."""

    schedule: Literal["linear", "cosine", "uniform"] = "linear"
    """Distribution of noise levels: linear (alpha = 1 - t), cosine (alpha = cos^2(pi t / 2)) or uniform in log_snr."""

    min_log_snr: float = -9.0
    """Log signal-to-noise ratio of the noisiest level (nats)."""

    max_log_snr: float = 9.0
    """Log signal-to-noise ratio of the cleanest level (nats)."""

    @model_validator(mode="after")
    def _levels_are_ordered(self) -> ScheduledNoise:
        if not -50 <= self.min_log_snr < self.max_log_snr <= 50:
            raise ValueError(
                "min_log_snr and max_log_snr must satisfy -50 <= min_log_snr < max_log_snr <= 50, "
                f"got {self.min_log_snr} and {self.max_log_snr}"
            )
        return self


class ObjectiveConfig(Section):
    """`objective: {weighting: surrogate}`: what is minimised and how tokens are added up."""

    weighting: str = "surrogate"
    """Loss weighting: `surrogate`, the bound's integrand without 1/p(log_snr), as in the paper; `elbo`, the bound
    itself; `flat`, plain cross-entropy of corrupted tokens; `dynamic`, the predecessor's weights, with
    `noise.process: gidd_time` alone; or a dotted path to a module of your own."""

    itakura_saito_weight: float = Field(default=1.0, ge=0)
    """Factor of the Itakura-Saito term in `loss`; 1 is the paper's. Never applied to the reported ELBO."""

    reduction: Literal["sum", "mean"] = "mean"
    """mean: the sum over the noisy tokens of the global batch, divided by their number; sum: undivided, as in the
    released code."""

    loss_kernel: Literal["auto", "plain", "chunked", "triton"] = "auto"
    """Computation of output layer and objective: chunk by chunk, in plain torch (chunked) or in Triton kernels
    (triton; auto takes them on GPUs where installed); plain makes whole logits, to compare with. The numbers are the
    same up to rounding."""

    stratified: bool = True
    """Spread each global batch's noise levels evenly over the schedule instead of drawing them independently."""


def noise_config(**values: Any) -> NoiseConfig:
    """Return the noise section with these values, checked by the process that they name.

    Raises:
        ValidationError: a value is wrong.
    """
    return PROCESSES.build(NoiseConfig, **values)


def objective_config(**values: Any) -> ObjectiveConfig:
    """Return the objective section with these values, checked by the weighting that they name.

    Raises:
        ValidationError: a value is wrong.
    """
    return WEIGHTINGS.build(ObjectiveConfig, **values)


def check_noise_and_objective(noise: NoiseConfig, objective: ObjectiveConfig) -> None:
    """Refuse a weighting that the noise does not have.

    Raises:
        ConfigError: in the words of the weighting's `check`.
    """
    check = getattr(WEIGHTINGS.member(objective.weighting), "check", None)
    if check is not None:
        check(noise)


def check_weighting_module(objective: ObjectiveConfig) -> None:
    """Refuse a weighting whose module has no loss, or one that takes other arguments.

    Raises:
        ConfigError: with what is missing.
    """
    member = WEIGHTINGS.member(objective.weighting)
    if not callable(getattr(member, "loss", None)):
        raise ConfigError(
            f"objective.weighting: `{objective.weighting}` must have a function `loss(terms, settings)` that returns "
            "what is minimised of every token, found none"
        )
    for function in ("loss", "reported_loss"):
        if hasattr(member, function):
            check_arguments(member, function, None, objective)


class ConditioningConfig(Section):
    """`conditioning: {preset: none}`: which positions stay clean and how noise levels vary along a sequence.

    A preset fills the fields that are not given; an explicit field always wins.
    """

    preset: Literal["none", "as_released", "as_described"] = "none"
    """none: every sequence noised at one level throughout; the others reproduce the paper's code or its text."""

    per_token_noise: float = Field(default=0.0, ge=0, le=1)
    """Probability that a sequence gets a noise level of its own at every token (diffusion forcing)."""

    linear_noise: float = Field(default=0.0, ge=0, le=1)
    """Probability that a sequence's noise grows linearly from its first to its last token (disjoint from
    `per_token_noise`)."""

    prompt: float = Field(default=0.0, ge=0, le=1)
    """Probability that a sequence keeps a noise-free prompt, of fraction arccos(1 - 2r) / pi with r uniform."""

    infilling: float = Field(default=0.0, ge=0, le=1)
    """Probability that a sequence keeps each token noise-free with a probability drawn by the prompt's law."""

    max_fraction: float = Field(default=1.0, ge=0, le=1)
    """Factor of the prompt's and the infilling's fraction."""

    pad_insertion: float = Field(default=0.0, ge=0, lt=0.5)
    """Largest share f of empty (pad) tokens inserted in a sequence; each sequence draws its own from U(0, f)."""

    pad_insertion_law: Literal["share", "released"] = "share"
    """share: a drawn f makes f of the sequence empty; released: the released code's ceil(S f / (1 - f)) of S tokens."""

    prompt_attention: Literal["block", "causal"] = "block"
    """Attention between prompt positions: over all of the prompt, or over what comes before."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        preset = data.get("preset") if isinstance(data, dict) else None
        return {**PRESETS[preset], **data} if isinstance(preset, str) and preset in PRESETS else data

    @property
    def trained_prompt_attention(self) -> Literal["block", "causal", "full"]:
        """Attention between prompt positions that a model learns; `full` if no training sequence has a prompt."""
        return self.prompt_attention if self.prompt > 0 else "full"

    @model_validator(mode="after")
    def _kinds_are_disjoint(self) -> ConditioningConfig:
        if self.per_token_noise + self.linear_noise > 1:
            raise ValueError(
                "per_token_noise and linear_noise exclude each other and must add up to at most 1, "
                f"got {self.per_token_noise} + {self.linear_noise}"
            )
        return self
