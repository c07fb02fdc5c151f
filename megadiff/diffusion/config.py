"""What a run says about its noise, its conditioning and its objective (`noise:`, `conditioning:`, `objective:`).

No torch here: reading a run description must stay instant.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from megadiff.config.section import Section
from megadiff.errors import ConfigError

ShiftName = Literal["masked", "low_uniform", "balanced", "high_uniform", "uniform"]
RateName = Literal["linear", "cosine", "uniform"]
Form = Literal["snr", "time"]
Weighting = Literal["surrogate", "elbo", "dynamic"]

SHIFTS: dict[str, float] = {
    "masked": -1000.0,
    "low_uniform": -2.0,
    "balanced": 0.0,
    "high_uniform": 2.0,
    "uniform": 1000.0,
}
"""The paper's five noise types, by the shift b of u(lambda) = sigmoid(a lambda + b) (arXiv:2512.10858, section 2.4)."""

SCALE_REASON = (
    "above 1 the rate at which uniform noise turns into masks, beta (pi - pi'), is negative at low signal-to-noise "
    "ratios, so the process does not exist; use a scale in (0, 1], 1 being the paper's"
)


GAMMA_REASON = (
    "at 0 the process does not start from clean text, and above 2 uniform tokens would have to be taken back near pure "
    "noise, at a negative rate; 1 is the predecessor's"
)

FORM_FIELDS: dict[Form, tuple[str, ...]] = {
    "snr": ("shift", "scale", "min_log_snr", "max_log_snr", "rate"),
    "time": ("p_uniform", "gamma", "time_eps"),
}
"""The settings that belong to one form alone."""


class NoiseConfig(Section):
    """`noise: {shift: balanced}`: which noise, and how its levels are drawn.

    A field of the other form is refused when given, whatever its value, and left out of the resolved tree. `null` takes
    back what a base file gave.
    """

    form: Form = "snr"
    """snr: hybrid noise in log_snr, arXiv:2512.10858; time: its predecessor, arXiv:2503.04482, for comparison."""

    shift: ShiftName | float = "balanced"
    """Shift b of the uniform share u = sigmoid(scale * log_snr + shift): a number, or masked (-1000), low_uniform (-2),
    balanced (0), high_uniform (2), uniform (1000)."""

    scale: float = Field(default=1.0, gt=0)
    """Scale a of the uniform share, in (0, 1]; the paper uses 1."""

    min_log_snr: float = -9.0
    """Log signal-to-noise ratio of the noisiest level (nats)."""

    max_log_snr: float = 9.0
    """Log signal-to-noise ratio of the cleanest level (nats)."""

    rate: RateName = "linear"
    """How noise levels are drawn: linear (alpha = 1 - t), cosine (alpha = cos^2(pi t / 2)) or uniform in log_snr."""

    p_uniform: float = Field(default=0.0, ge=0, lt=1)
    """With `form: time`: share of uniform tokens at t = 1/2, where it is largest; 0 is pure masking."""

    gamma: float = Field(default=1.0, gt=0)
    """With `form: time`: exponent of the uniform noise c_t = B (t (1 - t))^(gamma / 2), in (0, 2]."""

    time_eps: float = Field(default=1e-4, gt=0, lt=0.5)
    """With `form: time`: t is drawn uniformly from [time_eps, 1 - time_eps]."""

    @model_validator(mode="before")
    @classmethod
    def _null_takes_back(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    @field_validator("gamma")
    @classmethod
    def _gamma_keeps_rates_positive(cls, gamma: float) -> float:
        if gamma > 2:
            raise ValueError(f"gamma must be at most 2, got {gamma}: {GAMMA_REASON}")
        return gamma

    @field_validator("scale")
    @classmethod
    def _scale_keeps_rates_positive(cls, scale: float) -> float:
        if scale > 1:
            raise ValueError(f"scale must be at most 1, got {scale}: {SCALE_REASON}")
        return scale

    @model_validator(mode="after")
    def _levels_are_ordered(self) -> NoiseConfig:
        if not -50 <= self.min_log_snr < self.max_log_snr <= 50:
            raise ValueError(
                "min_log_snr and max_log_snr must satisfy -50 <= min_log_snr < max_log_snr <= 50, "
                f"got {self.min_log_snr} and {self.max_log_snr}"
            )
        return self

    @model_validator(mode="after")
    def _fields_are_the_forms(self) -> NoiseConfig:
        other: Form = "snr" if self.form == "time" else "time"
        foreign = [name for name in FORM_FIELDS[other] if name in self.model_fields_set]
        if foreign:
            raise ValueError(
                f"noise.form is {self.form}, which has no {', '.join(foreign)}: leave out what belongs to form {other} "
                f"(or set it to null), or set noise.form to {other}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_the_other_form(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A resolved tree must read back as itself, so it holds no field of the other form."""
        other: Form = "snr" if self.form == "time" else "time"
        return {key: value for key, value in handler(self).items() if key not in FORM_FIELDS[other]}

    @property
    def shift_value(self) -> float:
        """The shift as a number, whatever way it was given."""
        return SHIFTS[self.shift] if isinstance(self.shift, str) else self.shift

    @property
    def shift_name(self) -> str:
        """The paper's name of this shift, or `shift=<number>` where it has none."""
        names = [name for name, value in SHIFTS.items() if value == self.shift_value]
        return names[0] if names else f"shift={self.shift_value:g}"


class ObjectiveConfig(Section):
    """`objective: {name: gidd}`: what is optimised and how tokens are added up."""

    name: Literal["gidd", "ar"] = "gidd"
    """gidd: the diffusion bound; ar: next-token cross-entropy, for comparison."""

    weighting: Weighting = "surrogate"
    """surrogate: the bound's integrand without 1/p(log_snr), as in the paper; elbo: the bound itself; dynamic: the
    predecessor's weights (2 at masks, 1 at uniform tokens, little at clean ones), with `noise.form: time` alone."""

    is_weight: float = Field(default=1.0, ge=0)
    """Factor of the Itakura-Saito term in `loss`; 1 is the paper's. Never applied to the reported ELBO."""

    reduction: Literal["sum", "mean"] = "mean"
    """mean: over the noisy tokens of the global batch; sum: over them, as the released code."""

    head: Literal["auto", "plain", "chunked", "triton"] = "auto"
    """How output layer and objective are computed: chunk by chunk, in plain torch (chunked) or in Triton kernels
    (triton; auto takes them on GPUs where installed); plain makes whole logits, to compare with. The numbers are the
    same up to rounding."""

    stratified: bool = True
    """Spread each global batch's noise levels evenly over the schedule instead of drawing them independently."""


def check_noise_and_objective(noise: NoiseConfig, objective: ObjectiveConfig) -> None:
    """Refuse a weighting the noise does not have.

    Raises:
        ConfigError: dynamic weights without the time form.
    """
    if objective.weighting == "dynamic" and noise.form != "time":
        raise ConfigError(
            "objective.weighting is dynamic, which is defined by the time form alone (it needs its B), but noise.form "
            f"is {noise.form}: set noise.form to time, or objective.weighting to surrogate or elbo"
        )


PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "as_released": {"independent": 0.2, "prompt": 0.2, "empty": 0.0, "empty_law": "released"},
    "as_described": {"independent": 0.5, "prompt": 0.2, "empty": 0.2},
}
"""`as_described` is the paper's text (section 4.1); `as_released` what its code does with default flags, where the
value meant for empty tokens is passed as the share of independent noise and no empty token is ever inserted."""


class ConditioningConfig(Section):
    """`conditioning: {preset: none}`: which positions stay clean and how noise levels vary along a row.

    A preset fills the fields that are not given; an explicit field always wins.
    """

    preset: Literal["none", "as_released", "as_described"] = "none"
    """none: every row noised at one level throughout; the others reproduce the paper's code or its text."""

    independent: float = Field(default=0.0, ge=0, le=1)
    """Probability that a row gets an independent noise level at every token."""

    linear: float = Field(default=0.0, ge=0, le=1)
    """Probability that a row's noise grows linearly from its first to its last token (disjoint from `independent`)."""

    prompt: float = Field(default=0.0, ge=0, le=1)
    """Probability that a row keeps a noise-free prompt, of fraction arccos(1 - 2r) / pi with r uniform."""

    infill: float = Field(default=0.0, ge=0, le=1)
    """Probability that a row keeps each token noise-free with a probability drawn by the prompt's law."""

    max_fraction: float = Field(default=1.0, ge=0, le=1)
    """Factor of the prompt's and the infilling's fraction."""

    empty: float = Field(default=0.0, ge=0, lt=0.5)
    """Largest share f of empty (pad) tokens inserted in a row; each row draws its own from U(0, f)."""

    empty_law: Literal["share", "released"] = "share"
    """share: a drawn f makes f of the row empty; released: the released code's ceil(S f / (1 - f)) of S tokens."""

    prompt_attention: Literal["block", "causal"] = "block"
    """How prompt positions see each other: all of the prompt, or only what comes before."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        preset = data.get("preset") if isinstance(data, dict) else None
        return {**PRESETS[preset], **data} if isinstance(preset, str) and preset in PRESETS else data

    @model_validator(mode="after")
    def _kinds_are_disjoint(self) -> ConditioningConfig:
        if self.independent + self.linear > 1:
            raise ValueError(
                "independent and linear exclude each other and must add up to at most 1, "
                f"got {self.independent} + {self.linear}"
            )
        return self


assert set(SHIFTS) == set(get_args(ShiftName))
