"""The numbers of a run, from a goal and the laws: size, tokens, batch, learning rate, steps, and what bounds cost.

The optimum in real numbers and the shapes near it come from `goal`. For one shape, batch, learning rate and steps are
rounded here, with every bound that bit and its price in loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megadiff.errors import ConfigError
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.frontier import Frontier, ModelSize, effective_tokens, wasted_by_batch
from megadiff.scaling.goal import Aim, Bound, Goal, aim, annealing_ratio, laws_for, shape_flops, size_cost, sizes
from megadiff.scaling.laws import (
    Law,
    LawBook,
    extrapolations,
    needed,
    optimal_batch_tokens,
    optimal_learning_rate,
    published,
)

MIN_STEPS = 5000
"""Number of steps below which the laws have no runs."""

_WARMUP_STEPS, _COOLDOWN = 2000, 0.2
_LARGE_BATCH_TOKENS = 256 * 2048
"""Number of tokens in a batch from which the paper's sweeps took beta2 = 0.98 in place of 0.99."""


@dataclass(frozen=True)
class Plan:
    """The numbers of a run."""

    goal: Goal
    frontier: Frontier
    aim: Aim
    size: ModelSize
    tokens_wanted: float
    """Number of training tokens before rounding to whole steps."""
    batch_wanted: float
    """Number of tokens in a batch by the law, before bounds and rounding."""
    global_batch_size: int
    """Number of sequences in a batch."""
    learning_rate: float
    """CompleteP's base rate."""
    steps: int
    loss: float
    """Expected ELBO before the cooldown, in nats per token."""
    annealing_ratio: float
    """Loss before the cooldown over that after it."""
    bounds: tuple[Bound, ...]
    extrapolations: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def batch_tokens(self) -> int:
        """Number of tokens in a batch."""
        return self.global_batch_size * self.goal.seq_length

    @property
    def tokens(self) -> int:
        """Number of training tokens in whole steps."""
        return self.steps * self.batch_tokens

    @property
    def epochs(self) -> float | None:
        """Number of passes through the tokens at hand; None if that number is not known."""
        return None if self.goal.tokens is None else self.tokens / self.goal.tokens

    @property
    def beta2(self) -> float:
        """Decay of the second moment."""
        return 0.98 if self.batch_tokens >= _LARGE_BATCH_TOKENS else 0.99

    @property
    def warmup_steps(self) -> int:
        """Number of steps of the warm-up: the paper's 2000, at most a fifth of the run."""
        return min(_WARMUP_STEPS, self.steps // 5)

    @property
    def decay_steps(self) -> int:
        """Number of steps of the cooldown."""
        return round(_COOLDOWN * self.steps)

    @property
    def annealed_loss(self) -> float:
        """Expected ELBO after the cooldown, in nats per token."""
        return self.loss / self.annealing_ratio

    def flops_per_token(self, count: FlopCount) -> float:
        """Return the training FLOPs of a token."""
        goal = self.goal
        return self.size.flops_per_token(count, seq_length=goal.seq_length, vocab_size=goal.vocab_size)

    def flops(self, count: FlopCount) -> float:
        """Return the training FLOPs of the run."""
        return self.tokens * self.flops_per_token(count)

    @property
    def size_cost(self) -> float:
        """Share of the loss that the shape costs against the best size for the same budget."""
        return size_cost(self.goal, self.frontier, self.aim, self.law_size)

    @property
    def law_size(self) -> float:
        """Training FLOPs of a token by the laws' count."""
        return self.flops_per_token(self.frontier.flop_count)

    def second_method(self, book: LawBook) -> Frontier | None:
        """Return the surface fit of the runs behind the laws; None if there is none, or if the plan is made by it."""
        own = book.file_of(self.frontier.loss_law)
        surface = book.law("loss", noise=self.goal.noise, flop_count=self.frontier.flop_count, form="surface")
        if surface is None or self.frontier.size_law is None or book.file_of(surface).source != own.source:
            return None
        return Frontier(self.goal.noise, self.frontier.flop_count, surface, None)

    def interval(self) -> tuple[float, float] | None:
        """Return the ends of the interval of the loss before the cooldown; None if the laws have none."""
        ends = self.frontier.interval(self.law_size, self.tokens)
        middle = self.frontier.loss(self.law_size, self.tokens)
        return None if ends is None else (self.loss * ends[0] / middle, self.loss * ends[1] / middle)


def plan(goal: Goal, book: LawBook, size: ModelSize | None = None) -> Plan:
    """Return the numbers of a run of one shape.

    Args:
        goal: what the plan starts from.
        book: the laws.
        size: the shape; by default the first of `sizes`.

    Raises:
        ConfigError: the goal cannot be reached, or a law is missing.
    """
    laws = laws_for(goal, book)
    ratio = annealing_ratio(book, laws.noise)
    aimed = aim(goal, laws, ratio)
    shape = size or sizes(goal, laws, aimed)[0]
    tokens = _tokens(goal, laws, aimed, shape, None if goal.loss is None else goal.loss * ratio)
    batch_law = needed(book, "batch_tokens", laws.noise, estimator=goal.batch_estimator)
    rate_law = needed(book, "learning_rate", laws.noise)
    efficiency = efficiency_law(book, laws.noise)
    wanted = optimal_batch_tokens(tokens, noise=laws.noise, laws=book, estimator=goal.batch_estimator)
    sequences, why = _batch(goal, wanted, tokens, rate_law)
    steps = _steps(goal, tokens / (sequences * goal.seq_length))
    rate = optimal_learning_rate(sequences * goal.seq_length, noise=laws.noise, laws=book)
    trained = steps * sequences * goal.seq_length
    per_token = shape_flops(shape, goal, laws.flop_count)
    worth = effective_tokens(trained, goal.tokens, laws.repeat_scale)
    waste = wasted_by_batch(sequences * goal.seq_length / wanted, efficiency)
    if math.isinf(waste):
        raise ConfigError(
            f"a batch of {sequences:,} sequences ({why}) is {wanted / (sequences * goal.seq_length):.3g} times smaller "
            "than the best, below the smallest batch with which the hyperbola of the law file ever gets there; allow a "
            "larger batch or plan more tokens"
        )
    loss = laws.loss(per_token, worth / waste)
    bounds = [*aimed.bounds]
    if why:
        bounds.append(Bound(why, loss / laws.loss(per_token, worth) - 1))
    reached = {
        "flops": per_token * trained,
        "params": shape.params,
        "tokens": trained,
        "batch_tokens": sequences * goal.seq_length,
        "learning_rate": rate,
        "seq_length": goal.seq_length,
        "vocab_size": goal.vocab_size,
    }
    optimum = [law for law in (laws.loss_law, laws.size_law) if law is not None]
    run = {name: value for name, value in reached.items() if name not in ("flops", "params")}
    found = extrapolations(optimum, reached)
    found |= {name: text for name, text in extrapolations([batch_law, rate_law], run).items() if name not in found}
    outside = list(found.values())
    if steps < MIN_STEPS:
        outside.append(f"steps {steps:,} are fewer than {MIN_STEPS:,}, the fewest that were measured")
    is_own = book.law("repeat_scale", noise=laws.noise, form="constant") is not None
    if goal.tokens is not None and trained > goal.tokens and not is_own:
        outside.append("what repeated tokens are worth was measured for autoregressive models alone")
    return Plan(
        replace(goal, noise=laws.noise),
        laws,
        aimed,
        shape,
        tokens,
        wanted,
        sequences,
        rate,
        steps,
        loss,
        ratio,
        tuple(bounds),
        tuple(outside),
        tuple(law_remarks(book, laws, goal.batch_estimator)),
    )


def _tokens(goal: Goal, laws: Frontier, aimed: Aim, shape: ModelSize, loss: float | None) -> float:
    """Return the number of tokens that a shape is trained on."""
    per_token = shape_flops(shape, goal, laws.flop_count)
    if goal.budget is not None:
        budget, count = goal.budget
        tokens = budget / shape_flops(shape, goal, count)
        return tokens if goal.tokens is None else min(tokens, goal.tokens * goal.max_epochs)
    if goal.tokens is not None:
        return goal.tokens
    if loss is not None:
        return laws.tokens_for_loss(per_token, loss)
    return aimed.flops / per_token


def _steps(goal: Goal, exact: float) -> int:
    """Return whole steps: rounded up, but down where that would repeat tokens for less than a step."""
    rounded = math.ceil(exact / goal.step_multiple - 1e-9) * goal.step_multiple
    is_all = goal.tokens is not None and goal.budget is None
    return rounded - goal.step_multiple if is_all and rounded > max(exact, goal.step_multiple) else rounded


def efficiency_law(book: LawBook, noise: str) -> Law | None:
    """Return the hyperbola of steps over batch that prices a batch: the one with the middle g of a file.

    It comes from the first file that has any, of this noise or of all noises; of the published ones, any noise will do.
    """
    for file in book.files:
        is_published = any(file is each for each in published().files)
        hyperbolas = [law for law in file.laws if law.form == "hyperbola"]
        laws = [law for law in hyperbolas if is_published or law.noise in (noise, "all")]
        if laws:
            return sorted(laws, key=lambda law: law.parameter("g"))[len(laws) // 2]
    return None


def _batch(goal: Goal, wanted: float, tokens: float, rate_law: Law) -> tuple[int, str]:
    """Return the batch in sequences, and the bound that moved it from the law's, or an empty text."""
    limits = {"": wanted, f"steps: at least {MIN_STEPS:,} are wanted": tokens / MIN_STEPS}
    if goal.max_learning_rate is not None:
        factor, exponent = rate_law.parameter("A"), rate_law.parameter("alpha")
        largest = (goal.max_learning_rate / factor) ** (1 / exponent)
        limits[f"learning rate: at most {goal.max_learning_rate:g}"] = largest
    if goal.max_batch is not None:
        limits[f"batch: at most {goal.max_batch:,} sequences"] = goal.max_batch * goal.seq_length
    why, batch = min(limits.items(), key=lambda limit: limit[1])
    exact = batch / goal.seq_length
    multiple = goal.batch_multiple
    sequences = max(1, round(exact / multiple)) * multiple
    if why and sequences > exact * (1 + 1e-9) and sequences > multiple:
        sequences -= multiple
    by_law = wanted / goal.seq_length
    if not why and multiple > 1 and abs(math.log(sequences / by_law)) > 0.1:
        why = f"cluster: the batch is a multiple of {multiple:,} sequences"
    if not why:
        return sequences, ""
    return sequences, f"{why}; {sequences:,} sequences in place of {by_law:,.0f}"


def law_remarks(book: LawBook, laws: Frontier, batch_estimator: str) -> list[str]:
    """Return a sentence for every file whose laws are provisional, and one for each file that stands in for another."""
    used = [
        laws.loss_law,
        laws.size_law,
        needed(book, "batch_tokens", laws.noise, estimator=batch_estimator),
        needed(book, "learning_rate", laws.noise),
        book.law("annealing_ratio", noise=laws.noise, form="constant"),
    ]
    by_file: dict[int, list[Law]] = {}
    for law in (law for law in used if law is not None):
        file = next(place for place, file in enumerate(book.files) if any(own is law for own in file.laws))
        by_file.setdefault(file, []).append(law)
    found = []
    for place, own in by_file.items():
        file = book.files[place]
        if file.provisional or any(law.provisional for law in own):
            reasons = "; ".join(file.provisional_reasons[:3])
            more = len(file.provisional_reasons) - 3
            rest = f" and {more} more" if more > 0 else ""
            count = len(file.excluded)
            excluded = f"{count} run{'s' if count > 1 else ''} excluded" if count else ""
            why = f"{reasons}{rest}" if reasons else excluded
            found.append(f"the laws of {file.name} are provisional" + (f" ({why})" if why else ""))
    first = min(by_file)
    if laws.loss_law.noise == "all":
        found.append(f"the laws of {book.file_of(laws.loss_law).name} name no noise; they are taken for {laws.noise}")
    for place, own in by_file.items():
        if place != first:
            names = " and ".join(dict.fromkeys(law.quantity for law in own))
            found.append(
                f"{names} by the laws of {book.files[place].name}; {book.files[first].name} has none of its own"
            )
    return found
