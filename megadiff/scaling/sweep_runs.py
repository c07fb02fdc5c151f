"""The runs of a sweep: every noise, size, batch, learning rate and seed, with the budgets that each run serves.

A run serves the budgets whose optimal size its own is near to, that it reaches, and that lie behind its warm-up. It
ends at the last of them. Names and numbers follow from the description alone, so the same description gives the same
runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megadiff.errors import ConfigError
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.frontier import model_sizes
from megadiff.scaling.laws import NEXT_TOKEN, LawBook, optimal_batch_tokens, optimal_learning_rate
from megadiff.scaling.sweep import Neighbourhood, Shape, Sweep, SweptNoise, parse_shape

WARMUPS = 3
"""Multiple of the warm-up before which a loss does not count."""
REPEATED_EPOCHS = 1.5
"""Tokens trained on over different tokens above which a loss does not count: the laws are of new data."""
_FEWEST_SIZES = 3
_ROUNDING = 1e-12


@dataclass(frozen=True)
class BaseRun:
    """Facts of the base run that the runs of a sweep depend on."""

    seq_length: int
    warmup_steps: int
    micro_batch_size: int
    save_every: int
    """Number of steps between checkpoints."""
    flops_per_token: Callable[[Shape, FlopCount], float]
    """Training FLOPs of a token of a shape."""
    different_tokens: Callable[[float], float] | None = None
    """Number of different tokens among the first ones that a run trains on; None if the data are not there yet."""

    def repeats(self, tokens: float) -> bool:
        """Return whether a run of this number of tokens is known to repeat its data too often to count."""
        return self.different_tokens is not None and tokens > REPEATED_EPOCHS * self.different_tokens(tokens)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    noise: str
    shape: Shape
    flops_per_token: float
    """Training FLOPs of a token by the sweep's count."""
    full_flops_per_token: float
    """The same by the count `full`."""
    sequences: int
    """Number of sequences in a batch."""
    batch_tokens: int
    learning_rate: float
    seed: int
    budgets: tuple[float, ...]
    """Budgets that the run serves, in FLOPs by the sweep's count."""
    steps: int
    settings: tuple[str, ...]
    """Settings over those of the base run, as `key=value`, without the names of folder and run."""
    trunk: str | None = None
    """Name of the run that this one branches from for its cooldown; None for a run of its own."""
    first_step: int = 0
    """Number of steps of the trunk that a branch does not repeat."""

    @property
    def tokens(self) -> int:
        """Number of tokens that the run trains on, without its trunk's."""
        return (self.steps - self.first_step) * self.batch_tokens

    @property
    def flops(self) -> float:
        """Training FLOPs by the sweep's count."""
        return self.tokens * self.flops_per_token

    @property
    def full_flops(self) -> float:
        """Training FLOPs by the count `full`."""
        return self.tokens * self.full_flops_per_token

    @property
    def cell(self) -> tuple[str, Shape, int]:
        """Noise, shape and seed: batches and learning rates of one cell compete with each other."""
        return self.noise, self.shape, self.seed


@dataclass(frozen=True)
class Expansion:
    """The runs of a sweep, trunks before their branches, and remarks about budgets and runs that were left out."""

    runs: tuple[SweepRun, ...]
    remarks: tuple[str, ...]

    @property
    def noises(self) -> list[str]:
        """Noises in the order of the description."""
        return list(dict.fromkeys(run.noise for run in self.runs))


def expand(sweep: Sweep, base: BaseRun, book: LawBook) -> Expansion:
    """Return the runs of a sweep.

    Args:
        sweep: the description.
        base: facts of the base run.
        book: the laws, for optima, batches and rates.

    Raises:
        ConfigError: no run is left, two runs are the same, or a law is missing.
    """
    shapes, remarks = _shapes(sweep, base), _Remarks([noise.name for noise in sweep.noises])
    runs = [run for noise in sweep.noises for run in _runs_of(sweep, noise, shapes, base, book, remarks)]
    if not runs:
        raise ConfigError(f"{sweep.name}: no run serves any budget ({'; '.join(remarks.sentences())})")
    unserved = _unserved(runs)
    runs = [run for trunk in runs for run in _with_branches(sweep, trunk, base)]
    seen: set[str] = set()
    for run in runs:
        if run.name in seen:
            raise ConfigError(
                f"{sweep.name}: two runs would be named {run.name}; leave out one of the entries of `grid`"
            )
        seen.add(run.name)
    _add_thin_budgets(runs, remarks)
    return Expansion(tuple(runs), (*remarks.sentences(), *unserved))


class _Remarks:
    """Remarks about the runs of each noise; one that holds for several is given once."""

    def __init__(self, noises: Sequence[str]) -> None:
        self._noises, self._found = noises, dict[str, list[str]]()

    def add(self, remark: str, noise: str) -> None:
        """Add a remark about the runs of a noise."""
        self._found.setdefault(remark, []).append(noise)

    def sentences(self) -> list[str]:
        """Return the remarks, each with its noises unless it holds for all."""
        every = len(self._noises)
        return [
            remark if len(noises) == every else f"{', '.join(noises)}: {remark}"
            for remark, noises in self._found.items()
        ]


def _shapes(sweep: Sweep, base: BaseRun) -> list[Shape]:
    """Return the shapes, small ones first."""
    count = sweep.budgets.flop_count
    if sweep.sizes.shapes is not None:
        found = [parse_shape(text) for text in sweep.sizes.shapes]
        return sorted(found, key=lambda shape: base.flops_per_token(shape, count))
    wanted = sweep.sizes.range
    assert wanted is not None
    choices = [(Shape(size.layers, size.hidden, size.heads), size.oddness) for size in model_sizes()]
    sized = [(shape, base.flops_per_token(shape, count), odd) for shape, odd in choices]
    number = round(math.log(wanted.largest / wanted.smallest) / math.log(wanted.factor)) + 1
    found = []
    for place in range(number):
        target = wanted.smallest * wanted.factor**place
        shape, size, _ = min(sized, key=lambda each: abs(math.log(each[1] / target)) + 0.05 * each[2])
        if abs(math.log(size / target)) > math.log(wanted.factor) / 2:
            raise ConfigError(
                f"sizes.range: no usual shape has about {target:.3g} FLOPs a token (the nearest, {shape}, has "
                f"{size:.3g}); list shapes of your own under sizes.shapes"
            )
        found.append(shape)
    return list(dict.fromkeys(found))


def _runs_of(
    sweep: Sweep, noise: SweptNoise, shapes: Sequence[Shape], base: BaseRun, book: LawBook, remarks: _Remarks
) -> Iterator[SweepRun]:
    """Yield the runs of one noise."""
    early, repeated = Counter[float](), Counter[float]()
    for shape in shapes:
        size = base.flops_per_token(shape, sweep.budgets.flop_count)
        near = _near_budgets(sweep, noise, size, book)
        has_run = False
        for entry in sweep.grid:
            if not near or (entry.shapes is not None and str(shape) not in entry.shapes):
                continue
            for sequences, rate in _batches_and_rates(entry, noise, near, size, base, book):
                ends = {flops: _steps(flops, size, sequences, base.seq_length) for flops in near}
                reached = [flops for flops in near if entry.steps is None or ends[flops] <= entry.steps]
                served = [flops for flops in reached if ends[flops] >= WARMUPS * base.warmup_steps]
                early.update(flops for flops in reached if flops not in served)
                repeated.update(flops for flops in served if base.repeats(flops / size))
                if not served and entry.steps is None:
                    continue
                has_run = True
                steps = entry.steps or ends[served[-1]]
                for seed in _seeds_of(sweep, noise.name, shape):
                    yield _run(sweep, noise, entry, shape, base, sequences, rate, seed, tuple(served), steps)
        if not has_run:
            remarks.add(f"{shape} serves no budget and is left out", noise.name)
    if early:
        first = f"{WARMUPS * base.warmup_steps:,}"
        remarks.add(f"nothing counts before step {first}, {WARMUPS} warm-ups: {_named(early)}", noise.name)
    if repeated:
        remarks.add(
            f"data.train holds too little: a fit leaves out losses of tokens seen more than {REPEATED_EPOCHS:g} times, "
            f"{_named(repeated)}",
            noise.name,
        )


def _named(budgets: Counter[float]) -> str:
    """Return budgets with their numbers of runs."""
    return ", ".join(
        f"{flops:.3g} FLOPs in {number} run{'s' if number > 1 else ''}" for flops, number in sorted(budgets.items())
    )


def _steps(flops: float, size: float, sequences: int, seq_length: int) -> int:
    """Return the first step after which a budget is spent, as `eval.at_flops` finds it."""
    return math.ceil(math.ceil(flops / size * (1 - _ROUNDING) / seq_length) / sequences)


def _near_budgets(sweep: Sweep, noise: SweptNoise, size: float, book: LawBook) -> list[float]:
    """Return the budgets whose optimal size is within the sweep's factor of this one."""
    budgets, within = noise.budgets or sweep.budgets.flops, sweep.budgets.within
    if within == "all":
        return list(budgets)
    count = sweep.budgets.flop_count
    law = book.law("flops_per_token", noise=noise.name, flop_count=count)
    if law is None:
        raise ConfigError(
            f"budgets.within needs the optimal sizes of {noise.name}, and no law file has flops_per_token over flops "
            f"for it by the count {count}; name one of your own under `laws` (its noise may be `all`), or set "
            "within: all"
        )
    return [flops for flops in budgets if abs(math.log(size / law.value(flops))) <= math.log(within) * (1 + 1e-9)]


def _batches_and_rates(
    entry: Neighbourhood, noise: SweptNoise, near: Sequence[float], size: float, base: BaseRun, book: LawBook
) -> Iterator[tuple[int, float]]:
    """Yield the batches in sequences and the learning rates of one entry of the grid."""
    law_noise = "all" if noise.name == NEXT_TOKEN else noise.name
    if entry.sequences is not None:
        batches = list(entry.sequences)
    elif entry.tokens is not None:
        wrong = [tokens for tokens in entry.tokens if tokens % base.seq_length]
        if wrong:
            raise ConfigError(
                f"grid: a batch of {wrong[0]} tokens is no multiple of the {base.seq_length} of a sequence"
            )
        batches = [tokens // base.seq_length for tokens in entry.tokens]
    else:
        middle = math.sqrt(near[0] * near[-1]) / size
        by_law = optimal_batch_tokens(middle, noise=law_noise, laws=book)
        factors = entry.batches_of_law or ()
        batches = list(dict.fromkeys(max(1, round(factor * by_law / base.seq_length)) for factor in factors))
    for sequences in batches:
        rates = entry.learning_rates
        if rates is None:
            by_law = optimal_learning_rate(sequences * base.seq_length, noise=law_noise, laws=book)
            rates = tuple(float(f"{factor * by_law:.3g}") for factor in entry.rates_of_law or ())
        yield from ((sequences, rate) for rate in rates)


def _seeds_of(sweep: Sweep, noise: str, shape: Shape) -> list[int]:
    more = [seed for each in sweep.more_seeds if each.selects(noise, shape) for seed in each.add]
    return list(dict.fromkeys([*sweep.seeds, *more]))


def _run(
    sweep: Sweep, noise: SweptNoise, entry: Neighbourhood, shape: Shape, base: BaseRun, sequences: int, rate: float,
    seed: int, budgets: tuple[float, ...], steps: int,
) -> SweepRun:  # fmt: skip
    name = f"{noise.name}-L{shape.layers}-D{shape.hidden}-b{sequences}-lr{rate:g}-s{seed}"
    own = [f"seed={seed}", f"model.layers={shape.layers}", f"model.hidden={shape.hidden}", f"model.heads={shape.heads}"]
    own.append(f"method.name={NEXT_TOKEN}" if noise.name == NEXT_TOKEN else f"noise.shift={noise.name}")
    own.append(f"batch.global_batch_size={sequences}")
    if sequences % base.micro_batch_size:
        own.append(f"batch.micro_batch_size={math.gcd(sequences, base.micro_batch_size)}")
    own += [f"optimizer.lr={rate:g}", f"schedule.steps={steps}", f"eval.at_flops=[{', '.join(map(_number, budgets))}]"]
    count = sweep.budgets.flop_count
    return SweepRun(
        name=name,
        noise=noise.name,
        shape=shape,
        flops_per_token=base.flops_per_token(shape, count),
        full_flops_per_token=base.flops_per_token(shape, "full"),
        sequences=sequences,
        batch_tokens=sequences * base.seq_length,
        learning_rate=rate,
        seed=seed,
        budgets=budgets,
        steps=steps,
        settings=(*own, *noise.settings, *entry.settings),
    )


def _number(flops: float) -> str:
    """Return a number as YAML 1.1 and 1.2 both read it: with a point and a sign in the exponent."""
    text = repr(float(flops))
    digits, exponent = text.split("e") if "e" in text else (text, "")
    return f"{digits if '.' in digits else digits + '.0'}" + (f"e{exponent}" if exponent else "")


def _with_branches(sweep: Sweep, run: SweepRun, base: BaseRun) -> list[SweepRun]:
    """Return a run and the cooldowns that branch from it; the run keeps the checkpoint that they start from.

    Raises:
        ConfigError: the run is too short for a cooldown, or has several of different lengths.
    """
    chosen = [each for each in sweep.cooldowns if each.selects(run.noise, run.shape)]
    lengths = sorted({each.length for each in chosen if each.seeds is None or run.seed in each.seeds})
    if not lengths:
        return [run]
    if len(lengths) > 1:
        raise ConfigError(f"cooldowns: {run.name} has cooldowns of several lengths; leave all but one out")
    wanted = (1 - lengths[0]) * run.steps
    saves = max(1, round(wanted / base.save_every))
    every = round(wanted / saves)
    first = saves * every
    if not base.warmup_steps < first < run.steps:
        raise ConfigError(f"cooldowns: {run.name} has {run.steps} steps, too few for a cooldown of {lengths[0]:g}")
    kept = (f"checkpoint.every={every}", f"checkpoint.keep={math.ceil((run.steps - first) / every) + 2}")
    own = tuple(setting for setting in run.settings if not setting.startswith("eval.at_flops="))
    branch = replace(
        run,
        name=f"{run.name}-cooldown{lengths[0]:g}",
        budgets=(),
        settings=(*own, f"schedule.decay_steps={run.steps - first}"),
        trunk=run.name,
        first_step=first,
    )
    return [replace(run, settings=(*run.settings, *kept)), branch]


def _unserved(runs: Sequence[SweepRun]) -> list[str]:
    """Return the remark about runs that serve no budget, which only a fixed length keeps; none without such runs."""
    found = [run for run in runs if not run.budgets]
    if not found:
        return []
    shapes = ", ".join(dict.fromkeys(str(run.shape) for run in found))
    which = "1 run serves no budget and is" if len(found) == 1 else f"{len(found)} runs serve no budget and are"
    return [f"{which} trained for the `steps` of the grid alone: {shapes}"]


def _add_thin_budgets(runs: Sequence[SweepRun], remarks: _Remarks) -> None:
    """Add a remark about the budgets that too few sizes serve for a parabola."""
    sizes: dict[str, dict[float, set[Shape]]] = {}
    for run in runs:
        for flops in run.budgets:
            sizes.setdefault(run.noise, {}).setdefault(flops, set()).add(run.shape)
    for noise, found in sizes.items():
        thin = [f"{flops:.3g}" for flops in sorted(found) if len(found[flops]) < _FEWEST_SIZES]
        if thin:
            remarks.add(f"too few sizes for a parabola, which needs {_FEWEST_SIZES}: {', '.join(thin)} FLOPs", noise)
