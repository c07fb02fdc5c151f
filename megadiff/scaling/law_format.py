"""The format of a law file: what a law is, what is known of its error, and its values and intervals.

A law file is YAML. `published/` holds those of arXiv:2512.10858; `laws.write_law_file` writes one of a user's own.

    format: 1
    name: my-sweep                       # a word for messages
    source: runs/my-sweep                # where the numbers come from
    valid: {flops: [1e17, 3e19]}         # ranges that the runs covered; outside of them a law extrapolates
    runs: 40                             # number of runs that were fitted
    provisional: true                    # not to be relied upon yet
    provisional_reasons: ["1 run(s) left out: diverged"]
    excluded: [{run: L8-lr2, reason: diverged}]
    laws:
      - quantity: tokens                 # what the law gives: y
        of: flops                        # its variable: x
        form: power                      # y = A x^alpha + floor
        noise: masked                    # a noise's name, or `all`
        flop_count: deepseek             # how FLOPs are counted, wherever they occur
        parameters: {A: 56.8, alpha: {value: 0.434, standard_error: 0.01, interval: [0.41, 0.45]}}
        runs: 40                         # number of runs behind it
        held_out: [{at: 1e20, predicted: 2.77, measured: 2.78}]

| form | value | parameters |
|---|---|---|
| `power` | A x^alpha + floor | A, alpha; floor may be left out |
| `slope` | a power law of which the exponent alone is known | alpha |
| `surface` | E + a M^-alpha + b D^-beta, M FLOPs per token, D tokens | E, a, alpha, b, beta |
| `constant` | value | value |
| `hyperbola` | ((S / S_min)^g - 1) ((B / B_min)^g - 1) = 1 | S_min, B_min, g |

A parameter is a number, or a mapping with `value` and, where known, `standard_error` and `interval` at the law's
`confidence` (95 % unless given). The uncertainty of a law as a whole is its `draws`, one list of parameter values for
each bootstrap, or its `covariance`. Both name the parameters in the order of `parameters`, and a covariance takes the
positive factors A, a and b by their natural logarithms. Losses are in nats per token, before any cooldown; learning
rates are CompleteP's base rates; batches are counted in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megadiff.config.section import Section
from megadiff.errors import shown
from megadiff.scaling.flops import FlopCount

NEXT_TOKEN = "next_token"
"""Name, among the noises, of the autoregressive method."""

Quantity = Literal[
    "loss",
    "tokens",
    "flops_per_token",
    "params",
    "batch_tokens",
    "learning_rate",
    "annealing_ratio",
    "batch_efficiency",
    "repeat_scale",
    "noise_scale",
]
Variable = Literal["flops", "tokens", "params", "flops_per_token", "batch_tokens"]
Form = Literal["power", "slope", "surface", "constant", "hyperbola"]

_PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "power": (("A", "alpha"), ("floor",)),
    "slope": (("alpha",), ()),
    "surface": (("E", "a", "alpha", "b", "beta"), ()),
    "constant": (("value",), ()),
    "hyperbola": (("S_min", "B_min", "g"), ()),
}
"""Parameters that each form must have, and those that it may have."""

_LOGARITHMIC = ("A", "a", "b")


class Estimate(Section):
    """A parameter of a law: its value, with what is known of its error."""

    value: float
    """Best estimate."""
    standard_error: float | None = Field(default=None, ge=0)
    """Standard error."""
    interval: tuple[float, float] | None = None
    """Lower and upper end at the law's confidence."""

    @model_validator(mode="before")
    @classmethod
    def _value_alone(cls, given: Any) -> Any:
        if isinstance(given, dict | Estimate):
            return given
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise ValueError(f"a parameter is a number, or a mapping with `value`, found {shown(given)}")
        return {"value": given}

    @model_validator(mode="after")
    def _ends_are_ordered(self) -> Estimate:
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise ValueError(f"the interval's lower end {self.interval[0]:g} lies above its upper end")
        return self


class UnseenPoint(Section):
    """A prediction of a law that was fitted without the point it predicts."""

    at: float
    """Value of the law's variable."""
    predicted: float
    """Value that the law gave."""
    measured: float
    """Value that was measured."""


class Excluded(Section):
    """A run that was left out of the fits."""

    run: str
    """Name of the run."""
    reason: str
    """Reason, such as diverged or unfinished."""
    detail: str = ""
    """Evidence for the reason, such as the step at which the loss was not finite."""


class Law(Section):
    """One law; the module's docstring describes the keys."""

    quantity: Quantity
    """Quantity that the law gives."""
    of: Variable | None = None
    """Variable of the law; a power law needs one."""
    form: Form
    """Form of the law."""
    noise: str = "all"
    """Name of a noise, as in `noise.shift`, or `all`."""
    size: str = "all"
    """Name of the model size that the runs had, or `all`."""
    flop_count: FlopCount | None = None
    """Count of FLOPs; needed where FLOPs occur."""
    estimator: str = "vertex"
    """Way in which the points of the law were found: `vertex` of a parabola, `best_run`, for surfaces `lse` or
    `varpro`, or a word of one's own."""
    parameters: dict[str, Estimate]
    """Parameters by name."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Probability that an interval covers."""
    covariance: tuple[tuple[float, ...], ...] | None = None
    """Covariance of the parameters."""
    draws: tuple[tuple[float, ...], ...] | None = None
    """Values of the parameters in each bootstrap, a few hundred at most."""
    valid: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Ranges that replace the file's for this law."""
    at_loss: float | None = None
    """Loss of the iso-loss curve that a hyperbola describes."""
    runs: int | None = Field(default=None, ge=0)
    """Number of runs behind the law."""
    r_squared: float | None = Field(default=None, le=1)
    """Share of the variance that the fit explains."""
    held_out: tuple[UnseenPoint, ...] = ()
    """Predictions of points that the fit did not see."""
    provisional: bool = False
    """Whether runs are missing."""
    source: str | None = None
    """Origin of this law, where it is not the file's."""

    @model_validator(mode="after")
    def _parameters_fit_the_form(self) -> Law:
        needed, optional = _PARAMETERS[self.form]
        missing = [name for name in needed if name not in self.parameters]
        extra = [name for name in self.parameters if name not in (*needed, *optional)]
        if missing or extra:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has no parameter {', '.join(extra)}"
            raise ValueError(f"the form {self.form} {wrong}; it has {', '.join((*needed, *optional))}")
        if self.form in ("power", "slope") and self.of is None:
            raise ValueError(f"the form {self.form} needs `of`, the variable of the law")
        if any(self.parameters[name].value <= 0 for name in _LOGARITHMIC if name in self.parameters):
            raise ValueError("the factors A, a and b of a law must be positive")
        speaks_of_flops = self.of == "flops" or self.form == "surface" or self.quantity == "flops_per_token"
        if speaks_of_flops and self.flop_count is None:
            raise ValueError("a law with FLOPs needs `flop_count`: deepseek, chinchilla or full")
        return self

    @model_validator(mode="after")
    def _errors_fit_the_parameters(self) -> Law:
        number = len(self.parameters)
        if self.covariance is not None and [len(row) for row in self.covariance] != [number] * number:
            raise ValueError(f"the covariance of {number} parameters must be {number} x {number}")
        if self.draws is not None and any(len(draw) != number for draw in self.draws):
            raise ValueError(f"each of the draws must have {number} values, one for each parameter")
        return self

    @field_validator("noise")
    @classmethod
    def _noise_as_in_the_configuration(cls, noise: str) -> str:
        return noise.replace("-", "_")

    def value(self, x: float = 1.0, y: float = 1.0) -> float:
        """Return the law's value at x; for a surface x is FLOPs per token and y tokens."""
        return self._at({name: found.value for name, found in self.parameters.items()}, x, y)

    def parameter(self, name: str) -> float:
        """Return the value of a parameter."""
        return self.parameters[name].value

    def interval(self, x: float, y: float = 1.0) -> tuple[float, float] | None:
        """Return the ends of the interval of the value at x, at the law's confidence; None where no error is known.

        It follows from the draws, the covariance, or, of a power law, from the interval of the exponent alone. The
        last takes the value in the geometric middle of the valid range as known.
        """
        if self.draws is not None:
            names = list(self.parameters)
            found = [self._at(dict(zip(names, draw, strict=True)), x, y) for draw in self.draws]
            tail = 50 * (1 - self.confidence)
            import numpy as np

            low, high = np.percentile(found, [tail, 100 - tail])
            return float(low), float(high)
        if self.covariance is not None:
            error = self._standard_error(x, y) * NormalDist().inv_cdf(0.5 + self.confidence / 2)
            middle = self.value(x, y)
            return middle * math.exp(-error), middle * math.exp(error)
        if self.form == "constant":
            return self.parameters["value"].interval
        exponent = self.parameters.get("alpha")
        limits = self.valid.get(self.of or "")
        if self.form != "power" or exponent is None or exponent.interval is None or limits is None:
            return None
        away = math.log(x / math.sqrt(limits[0] * limits[1]))
        middle = self.value(x, y)
        ends = [middle * math.exp((end - exponent.value) * away) for end in exponent.interval]
        return min(ends), max(ends)

    def _standard_error(self, x: float, y: float) -> float:
        """Return the standard error of the value's logarithm, to first order in the parameters'."""
        values = {name: found.value for name, found in self.parameters.items()}
        slopes = []
        for name in values:
            step = 1e-5 if name in _LOGARITHMIC else 1e-5 * max(1.0, abs(values[name]))
            moved = [
                {
                    **values,
                    name: values[name] * math.exp(side * step) if name in _LOGARITHMIC else values[name] + side * step,
                }
                for side in (1, -1)
            ]
            up, down = (math.log(self._at(each, x, y)) for each in moved)
            slopes.append((up - down) / (2 * step))
        rows = zip(slopes, self.covariance or (), strict=True)
        variance = sum(one * sum(c * two for c, two in zip(row, slopes, strict=True)) for one, row in rows)
        return math.sqrt(max(0.0, variance))

    def _at(self, values: Mapping[str, float], x: float, y: float) -> float:
        if self.form == "power":
            return values["A"] * x ** values["alpha"] + values.get("floor", 0.0)
        if self.form == "surface":
            return values["E"] + values["a"] * x ** -values["alpha"] + values["b"] * y ** -values["beta"]
        if self.form == "constant":
            return values["value"]
        raise ValueError(f"a law of the form {self.form} has no value at a point")


class LawFile(Section):
    """A file of laws; the module's docstring describes its keys."""

    format: Literal[1] = 1
    """Version of the format."""
    name: str = Field(min_length=1)
    """Word for the file in messages."""
    source: str = Field(min_length=1)
    """Origin of the numbers."""
    summary: str = ""
    """Explanation for readers."""
    valid: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """Ranges that the runs covered, by quantity: flops, params, tokens, batch_tokens, learning_rate, seq_length,
    vocab_size."""
    runs: int | None = Field(default=None, ge=0)
    """Number of runs that were fitted."""
    provisional: bool = False
    """Whether the laws are not to be relied upon yet, for example because runs are missing."""
    provisional_reasons: tuple[str, ...] = ()
    """Reasons why they are not, a sentence each."""
    excluded: tuple[Excluded, ...] = ()
    """Runs left out of the fits."""
    laws: tuple[Law, ...]
    """The laws, at least one."""

    @model_validator(mode="after")
    def _one_law_of_a_kind(self) -> LawFile:
        if not self.laws:
            raise ValueError("`laws` is empty; at least one law is wanted")
        seen = set()
        for law in self.laws:
            if (kind := _kind(law)) in seen:
                words = ", ".join(str(word) for word in kind if word is not None)
                raise ValueError(f"two laws are of one kind ({words}); leave one of them out")
            seen.add(kind)
        return self


def _kind(law: Law) -> tuple[Any, ...]:
    return law.quantity, law.form, law.noise, law.size, law.flop_count, law.estimator, law.at_loss
