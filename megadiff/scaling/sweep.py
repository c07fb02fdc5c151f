"""The description of a sweep: noises, sizes, budgets, and the neighbourhoods of batch and learning rate. No torch.

    name: mini
    run: mini_run.yaml                         # base run; paths are relative to this file
    settings: [optimizer.beta2=0.98]           # settings of every run over those of the base run
    laws: pilot_laws.yaml                      # laws of one's own before the published ones: optima, batches, rates
    noises: [masked, {name: uniform, budgets: [6.4e+11, 1.28e+12]}, next_token]
    sizes: {shapes: [2x32x1, 4x64x2]}          # layers x width x heads; or {range: {smallest, largest, factor}}
    budgets: {flops: [3.2e+11, 6.4e+11], flop_count: deepseek, within: 4}
    grid:
      - {sequences: [32], learning_rates: [0.1]}
      - {batches_of_law: [0.5, 1, 2], rates_of_law: [0.7, 1, 1.4]}
    seeds: [0]
    more_seeds: [{add: [1, 2], shapes: [4x64x2]}]
    cooldowns: [{shapes: [4x64x2], length: 0.2}]

One run with a constant learning rate serves all budgets of its size and ends at the last of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megadiff.config.load import load_config
from megadiff.config.section import Section
from megadiff.config.suggestions import did_you_mean
from megadiff.diffusion.processes.gidd_snr import SHIFTS
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.laws import NEXT_TOKEN

_SHAPE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,5})x([1-9]\d{0,4})")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class Shape(NamedTuple):
    """Depth, width and attention heads of a model."""

    layers: int
    hidden: int
    heads: int

    def __str__(self) -> str:
        return f"{self.layers}x{self.hidden}x{self.heads}"


def parse_shape(text: str) -> Shape:
    """Return a shape written as layers x width x heads.

    Raises:
        ValueError: it has another form, or the heads do not divide the width.
    """
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise ValueError(f"a shape is written LAYERSxWIDTHxHEADS, such as 4x64x2, found {text!r}")
    shape = Shape(*map(int, found.groups()))
    if shape.hidden % shape.heads:
        raise ValueError(f"the {shape.heads} heads of {text} do not divide its width {shape.hidden}")
    return shape


def _positive(values: Sequence[float] | None, what: str) -> None:
    if values is None:
        return
    if not values:
        raise ValueError(f"{what} is empty; give at least one")
    if min(values) <= 0:
        raise ValueError(f"{what} must be above 0, found {min(values):g}")
    if len(set(values)) < len(values):
        raise ValueError(f"{what} has {next(v for v in values if list(values).count(v) > 1):g} twice")


class SweptNoise(Section):
    """A noise, or the method `next_token`, with what is its own; a name alone is enough."""

    name: str
    """Name of a noise, as in `noise.shift`, or `next_token`."""
    budgets: tuple[float, ...] | None = None
    """Budgets in FLOPs in place of the sweep's."""
    settings: tuple[str, ...] = ()
    """Further settings of these runs, as `key=value`."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        name, known = name.replace("-", "_"), (*SHIFTS, NEXT_TOKEN)
        if name not in known:
            near = did_you_mean(name, known)
            raise ValueError(f"`{name}` is no noise{near or ''}; there are {', '.join(known)}")
        return name

    @field_validator("budgets")
    @classmethod
    def _budgets_count_up(cls, budgets: tuple[float, ...] | None) -> tuple[float, ...] | None:
        _positive(budgets, "budgets")
        return None if budgets is None else tuple(sorted(budgets))


class SizeRange(Section):
    """Sizes at equal distances, each by the usual shape nearest to it."""

    smallest: float = Field(gt=0)
    """Training FLOPs of a token of the smallest model, by the count of the budgets."""
    largest: float = Field(gt=0)
    """Training FLOPs of a token of the largest model."""
    factor: float = Field(gt=1.02)
    """Ratio of neighbouring sizes."""

    @model_validator(mode="after")
    def _grows(self) -> SizeRange:
        if self.largest < self.smallest:
            raise ValueError(f"largest is {self.largest:g}, below smallest, {self.smallest:g}")
        return self


class Sizes(Section):
    """Model sizes: a list of shapes, or a range."""

    shapes: tuple[str, ...] | None = None
    """Shapes as layers x width x heads."""
    range: SizeRange | None = None
    """Range of sizes."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Sizes:
        if (self.shapes is None) == (self.range is None):
            raise ValueError("give either `shapes` or `range`")
        if self.shapes is not None:
            shapes = [parse_shape(text) for text in self.shapes]
            if not shapes:
                raise ValueError("shapes is empty; give at least one")
            twice = [
                shape for place, shape in enumerate(shapes) if shape[:2] in [other[:2] for other in shapes[:place]]
            ]
            if twice:
                raise ValueError(f"two shapes have {twice[0].layers} layers of width {twice[0].hidden}; leave one out")
        return self


class Budgets(Section):
    """Budgets of compute at which sizes are compared."""

    flops: tuple[float, ...]
    """Training FLOPs."""
    flop_count: FlopCount = "deepseek"
    """Count of the FLOPs."""
    within: Literal["all"] | float = "all"
    """Factor around the laws' optimum within which sizes serve a budget, or `all`."""

    @field_validator("flops")
    @classmethod
    def _count_up(cls, flops: tuple[float, ...]) -> tuple[float, ...]:
        _positive(flops, "flops")
        return tuple(sorted(flops))

    @field_validator("within")
    @classmethod
    def _is_a_factor(cls, within: Literal["all"] | float) -> Literal["all"] | float:
        if within != "all" and within <= 1:
            raise ValueError(f"within is a factor above 1, or all, found {within:g}")
        return within


class Neighbourhood(Section):
    """Batches, each with all of the learning rates."""

    sequences: tuple[int, ...] | None = None
    """Batches in sequences."""
    tokens: tuple[int, ...] | None = None
    """Batches in tokens, multiples of the sequence length."""
    batches_of_law: tuple[float, ...] | None = None
    """Batches as multiples of the batch law's, at the geometric middle of the tokens of the run's budgets."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates, as `optimizer.lr`."""
    rates_of_law: tuple[float, ...] | None = None
    """Learning rates as multiples of the rate law's for the batch."""
    steps: int | None = Field(default=None, gt=0)
    """Length of these runs; unset, a run ends at its last budget. A run only serves the budgets that it reaches."""
    shapes: tuple[str, ...] | None = None
    """Shapes that have these batches; unset, all."""
    settings: tuple[str, ...] = ()
    """Further settings of these runs, as `key=value`."""

    @model_validator(mode="after")
    def _one_of_each(self) -> Neighbourhood:
        for names in (("sequences", "tokens", "batches_of_law"), ("learning_rates", "rates_of_law")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) != 1:
                found = " and ".join(given) if given else "none of them"
                raise ValueError(f"give exactly one of {', '.join(names)}; found {found}")
            _positive(getattr(self, given[0]), given[0])
        return self


class Selection(Section):
    """Runs by noise, shape and seed; what is unset selects all."""

    noises: tuple[str, ...] | None = None
    """Names of noises."""
    shapes: tuple[str, ...] | None = None
    """Shapes as layers x width x heads."""

    def selects(self, noise: str, shape: Shape) -> bool:
        """Return whether runs of this noise and shape are selected."""
        return (self.noises is None or noise in self.noises) and (self.shapes is None or str(shape) in self.shapes)


class MoreSeeds(Selection):
    """Further seeds of chosen runs."""

    add: tuple[int, ...]
    """Seeds beside the sweep's."""

    @field_validator("add")
    @classmethod
    def _are_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _seeds(seeds)


class Cooldowns(Selection):
    """Branches of chosen runs that end at the same step with a cooldown, for the ratio of the two losses."""

    length: float = Field(default=0.2, gt=0, lt=1)
    """Share of the run that the cooldown takes."""
    seeds: tuple[int, ...] | None = None
    """Seeds whose runs branch; unset, all."""


def _seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are different whole numbers from 0 on, at least one, found {list(seeds)}")
    return seeds


class Sweep(Section):
    """A sweep; the module's docstring shows one."""

    name: str
    """Name of the sweep's folder inside `output_dir`."""
    output_dir: str = "runs"
    """Folder of the sweep's folder."""
    run: str
    """Path of the base run's description, relative to this file."""
    settings: tuple[str, ...] = ()
    """Settings of every run over those of the base run, as `key=value`."""
    laws: str | None = None
    """Path of a law file that is read before the published laws, relative to this file."""
    noises: tuple[SweptNoise, ...]
    """Noises, and `next_token`."""
    sizes: Sizes
    budgets: Budgets
    grid: tuple[Neighbourhood, ...]
    """Batches and learning rates."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every run."""
    more_seeds: tuple[MoreSeeds, ...] = ()
    """Further seeds of chosen runs."""
    cooldowns: tuple[Cooldowns, ...] = ()
    """Cooldown branches of chosen runs."""

    @classmethod
    def other_kind(cls, keys: Collection[str]) -> str | None:
        """Return that a file is the description of a run, and what a sweep does with one, if it plainly is one."""
        if not {"model", "data", "optimizer"} & set(keys) or {"run", "sizes", "budgets", "grid"} & set(keys):
            return None
        return (
            "this is the description of a run, not of a sweep; `megadiff train --config` trains it, and the "
            "description of a sweep names it as `run`, beside noises, sizes, budgets and grid (see docs/scaling.md)"
        )

    @field_validator("name")
    @classmethod
    def _name_is_plain(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"name is letters, digits, `_`, `-` and `.`, at most 64, found {name!r}")
        return name

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _seeds(seeds)

    @field_validator("noises")
    @classmethod
    def _noises_differ(cls, noises: tuple[SweptNoise, ...]) -> tuple[SweptNoise, ...]:
        names = [noise.name for noise in noises]
        if not names or len(set(names)) < len(names):
            twice = next((name for name in names if names.count(name) > 1), None)
            raise ValueError("at least one noise is wanted" if twice is None else f"the noise {twice} is there twice")
        return noises

    @field_validator("grid", "more_seeds", "cooldowns")
    @classmethod
    def _selects_what_there_is(cls, entries: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        if info.field_name == "grid" and not entries:
            raise ValueError("grid is empty; at least one entry is wanted")
        noises, sizes = info.data.get("noises"), info.data.get("sizes")
        if noises is None or sizes is None:
            return entries  # they have mistakes of their own
        named: dict[str, list[str]] = {"noise": [noise.name for noise in noises]}
        if sizes.shapes is not None:
            named["shape"] = list(sizes.shapes)
        for kind, known in named.items():
            given = [name for entry in entries for name in getattr(entry, f"{kind}s", None) or ()]
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"{info.field_name} names the {kind} {unknown[0]}; this sweep has {', '.join(known)}")
        return entries


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Return the description of a sweep, with the paths of base run and laws as seen from here.

    Raises:
        ConfigError: all mistakes found, a line each, each with its file and line.
    """
    found = load_config(path, overrides, Sweep)
    paths = {key: str(path.parent / value) for key in ("run", "laws") if (value := getattr(found, key)) is not None}
    return found.model_copy(update=paths)
