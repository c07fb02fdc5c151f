"""Scaling laws as data: the format of law files, their reader and writer, and the optima that their laws predict.

A law file is YAML. `published/` holds those of arXiv:2512.10858; `write_law_file` writes one of a user's own.

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

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megadiff.config.load import dump_value
from megadiff.config.messages import validated
from megadiff.config.nodes import Place, parse_yaml
from megadiff.config.section import Section
from megadiff.config.suggestions import did_you_mean
from megadiff.diffusion.processes.gidd_snr import SHIFTS
from megadiff.errors import ConfigError, shown
from megadiff.files import UnreadableFileError, read_text, why, write_atomically
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
    """Value of the law's variable; for a surface the largest product of its two, which is the compute."""
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
    """Way in which the points of the law were found: `vertex` of a parabola, `best_run`, `single_bowl` for all budgets,
    for surfaces `lse` or `varpro`, or a word of one's own."""
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


__all__ = [
    "NOISES",
    "PUBLISHED",
    "Estimate",
    "Excluded",
    "Law",
    "LawBook",
    "LawFile",
    "Optimum",
    "UnseenPoint",
    "compute_optimal",
    "extrapolations",
    "known_noise",
    "law_book",
    "needed",
    "optimal_batch_tokens",
    "optimal_learning_rate",
    "published",
    "read_law_file",
    "write_law_file",
]

PUBLISHED = Path(__file__).with_name("published")
"""Folder of the published laws."""

NOISES = tuple(SHIFTS)
"""Noises that the published laws cover, by the names of `noise.shift`."""

_MAX_BYTES = 16 * 2**20
_NEXT_BEST = {"power": ("best_run",), "surface": ("lse", "varpro")}


def read_law_file(path: str | Path) -> LawFile:
    """Return the laws of a file, each with the file's ranges under its own.

    Raises:
        ConfigError: the file is missing, damaged, of another format, or has an unknown key; file and key are named.
    """
    try:
        text = read_text(Path(path), max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{path}: the law file does not exist; check the path") from None
    except (OSError, UnreadableFileError) as error:
        raise ConfigError(f"{path}: the law file {why(error)}; give a YAML file in UTF-8") from None
    place = Place(str(path))
    tree = parse_yaml(text, place)
    if tree is None or not isinstance(tree.value, dict):
        raise ConfigError(f"{place}: a law file is a mapping with the keys format, name, source and laws")
    version = tree.child("format")
    if version is None or version.value != "1":
        found = "none" if version is None else version
        raise ConfigError(f"{place}: `format` must be 1, the law file format of this version, found {found}")
    file = validated(tree, LawFile)
    laws = tuple(law.model_copy(update={"valid": {**file.valid, **law.valid}}) for law in file.laws)
    return file.model_copy(update={"laws": laws})


def write_law_file(path: str | Path, file: LawFile) -> None:
    """Write a law file that `read_law_file` reads as an equal one; what has its default is left out.

    Ranges that a law shares with the file are written once, at the top.

    Raises:
        OSError: the disk refuses.
    """
    tree = file.model_dump(mode="json", exclude_defaults=True)
    shared = tree.get("valid", {})
    lines = ["format: 1"]
    lines += [f"{key}: {dump_value(value)}" for key, value in tree.items() if key not in ("format", "laws")]
    lines.append("laws:")
    for law in tree["laws"]:
        own = {key: ends for key, ends in law.pop("valid", {}).items() if shared.get(key) != ends}
        law["parameters"] = {
            name: found.get("value") if set(found) == {"value"} else found for name, found in law["parameters"].items()
        }
        law |= {"valid": own} if own else {}
        (first, value), *rest = law.items()
        lines.append(f"  - {first}: {dump_value(value)}")
        lines += [f"    {key}: {dump_value(value)}" for key, value in rest]
    write_atomically(Path(path), "\n".join(lines) + "\n")


@dataclass(frozen=True)
class LawBook:
    """Law files in the order in which they are looked through: a user's own before the published ones."""

    files: tuple[LawFile, ...]

    def law(
        self,
        quantity: Quantity,
        *,
        noise: str,
        flop_count: FlopCount | None = None,
        form: Form = "power",
        estimator: str = "vertex",
    ) -> Law | None:
        """Return the first law of a kind, of this noise before one of all noises; None if there is none.

        The estimator `vertex` is the main one: a file without it answers with its next best, `best_run` for power laws
        and `lse` for surfaces.
        """
        estimators = (estimator, *_NEXT_BEST.get(form, ())) if estimator == "vertex" else (estimator,)
        for file in self.files:
            for named in (noise, "all"):
                kind = (quantity, form, named, "all")
                laws = [law for law in file.laws if (law.quantity, law.form, law.noise, law.size) == kind]
                for wanted in estimators:
                    for law in laws:
                        if law.estimator == wanted and flop_count in (None, law.flop_count):
                            return law
        return None

    def file_of(self, law: Law) -> LawFile:
        """Return the file that a law comes from."""
        return next(file for file in self.files if any(own is law for own in file.laws))

    @property
    def noises(self) -> list[str]:
        """Noises of whose loss the first file has a law."""
        return list(dict.fromkeys(law.noise for law in self.files[0].laws if law.quantity == "loss"))

    @property
    def plannable(self) -> list[str]:
        """Noises that can be planned for: those of the first file, and any if it has a law of all noises."""
        return list(dict.fromkeys([*self.noises, *(NOISES if "all" in self.noises else ())]))


@functools.cache
def published() -> LawBook:
    """Return the laws of arXiv:2512.10858: the main fits first, then the other fits of the same runs."""
    return LawBook(tuple(read_law_file(PUBLISHED / f"{name}.yaml") for name in ("gidd", "gidd_variants")))


def law_book(path: str | Path | None) -> LawBook:
    """Return the laws of a file with the published ones behind it, or the published ones alone."""
    return published() if path is None else LawBook((read_law_file(path), *published().files))


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal run of a budget, by the laws and before any rounding."""

    loss: float
    """ELBO in nats per token, without a cooldown."""
    tokens: float
    """Number of training tokens."""
    flops_per_token: float
    """Training FLOPs of a token, by the count of the budget."""
    params: float
    """Number of parameters without embedding and head."""
    batch_tokens: float
    """Number of tokens in a batch."""
    learning_rate: float
    """Base learning rate of CompleteP."""


def known_noise(noise: str, noises: Sequence[str] = NOISES) -> str:
    """Return a noise's name as in `noise.shift`.

    Raises:
        ConfigError: the laws have no such noise.
    """
    name = noise.replace("-", "_")
    if name not in noises:
        near = did_you_mean(name, noises)
        raise ConfigError(f"no law is known for the noise `{noise}`{near or ';'} there are {', '.join(noises)}")
    return name


def compute_optimal(
    flops: float, noise: str, *, method: FlopCount = "deepseek", laws: LawBook | None = None
) -> Optimum:
    """Return what the laws predict to be best for a budget of training FLOPs.

    Args:
        flops: the budget, by the count `method`.
        noise: `masked`, `low_uniform`, `balanced`, `high_uniform` or `uniform`, also with dashes.
        method: the count of FLOPs, of which there must be laws: `deepseek` or `chinchilla`.
        laws: laws to read; by default the published ones.

    Raises:
        ConfigError: the budget is no positive number, or there is no law for the noise or the count.
    """
    book = laws or published()
    name = known_noise(noise, book.plannable)
    if not (math.isfinite(flops) and flops > 0):
        raise ConfigError(f"a budget is a positive number of FLOPs, found {flops:g}")
    quantities: tuple[Quantity, ...] = ("loss", "tokens", "flops_per_token", "params")
    loss, tokens, size, params = (needed(book, quantity, name, method).value(flops) for quantity in quantities)
    batch = optimal_batch_tokens(tokens, noise=name, laws=book)
    return Optimum(loss, tokens, size, params, batch, optimal_learning_rate(batch, noise=name, laws=book))


def needed(
    book: LawBook, quantity: Quantity, noise: str, flop_count: FlopCount | None = None, *, estimator: str = "vertex"
) -> Law:
    """Return the power law of a quantity.

    Raises:
        ConfigError: the files have none.
    """
    law = book.law(quantity, noise=noise, flop_count=flop_count, estimator=estimator)
    if law is not None:
        return law
    counted, named = f" by the count {flop_count}" if flop_count else "", ", ".join(file.name for file in book.files)
    raise ConfigError(f"no law of {quantity} for {noise} noise{counted} ({estimator}) is in the law files {named}")


def optimal_batch_tokens(
    tokens: float, *, noise: str = "all", laws: LawBook | None = None, estimator: str = "vertex"
) -> float:
    """Return the batch, in tokens, that is best for a run of this number of tokens (the pooled law by default)."""
    return needed(laws or published(), "batch_tokens", noise, estimator=estimator).value(tokens)


def optimal_learning_rate(batch_tokens: float, *, noise: str = "all", laws: LawBook | None = None) -> float:
    """Return the base learning rate that is best for a batch of this number of tokens (the pooled law by default)."""
    return needed(laws or published(), "learning_rate", noise).value(batch_tokens)


def extrapolations(laws: Iterable[Law], values: Mapping[str, float]) -> dict[str, str]:
    """Return a phrase for each value, by its name, that lies outside the range of a law that speaks of it."""
    found: dict[str, str] = {}
    for law in laws:
        for name, value in values.items():
            limits = law.valid.get(name)
            if limits is not None and not limits[0] * (1 - 1e-6) <= value <= limits[1] * (1 + 1e-6):
                side = "above" if value > limits[1] else "below"
                end = limits[1] if value > limits[1] else limits[0]
                at, to = (f"{each:,.0f}" if 100 <= each < 1e6 else f"{each:.3g}" for each in (value, end))
                found[name] = f"{name} {at} is {side} {to}, the end of what was measured"
    return found
