"""The goal of a plan, and its optimum in real numbers: best size and budget, and the shapes near it.

A goal states one or two of a budget of FLOPs (also as GPUs and hours), the tokens at hand, a model size and a loss to
reach. One of them leaves the rest to the laws; two fix size and tokens. Budgets of another count of FLOPs than the
laws' are converted at the shape that they are spent on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megadiff.errors import ConfigError
from megadiff.platform.gpus import Gpu
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.frontier import Frontier, ModelSize, effective_tokens, frontier, model_sizes
from megadiff.scaling.laws import LawBook

_FAR = 1e4
"""Factor outside the laws' range of FLOPs beyond which nothing is planned."""


@dataclass(frozen=True)
class Hardware:
    """GPUs that a run has, and the share of their peak that it reaches."""

    gpu: Gpu
    number: int
    utilisation: float
    """Model FLOPs utilisation (MFU), between 0 and 1."""
    hours: float | None = None
    """Hours at hand; None if they are to be found."""

    @property
    def flops_per_s(self) -> float:
        """FLOPs a second that count, of all GPUs, by the count `full`."""
        return self.gpu.peak_flops * self.number * self.utilisation


@dataclass(frozen=True)
class Goal:
    """Starting point of a plan; budget, GPUs, tokens, size and loss are alternatives, of which one or two are given."""

    noise: str
    flops: float | None = None
    """Budget, by `flop_count`."""
    hardware: Hardware | None = None
    """A budget if it has hours."""
    tokens: float | None = None
    """Number of different tokens at hand."""
    params: float | None = None
    """Number of parameters without embedding and head."""
    loss: float | None = None
    """Loss to reach after the cooldown, in nats per token."""
    size: ModelSize | None = None
    """Exact shape, in place of `params`."""
    flop_count: FlopCount = "deepseek"
    seq_length: int = 2048
    vocab_size: int = 131_072
    tolerance: float = 0.0025
    """Share of the loss that a size may cost."""
    max_epochs: float = 4.0
    """Largest number of passes through the tokens at hand."""
    batch_estimator: str = "vertex"
    """Estimator of the batch law: `vertex` for the main fit, `sizing` for the one of the paper's large runs."""
    batch_multiple: int = 1
    """Number of sequences that the batch must be a multiple of."""
    step_multiple: int = 1
    """Number of steps that the run is rounded up to a multiple of."""
    max_batch: int | None = None
    """Largest batch, in sequences."""
    max_learning_rate: float | None = None
    """Largest base learning rate."""

    @property
    def budget(self) -> tuple[float, FlopCount] | None:
        """The budget and its count; None if there is none."""
        if self.flops is not None:
            return self.flops, self.flop_count
        if self.hardware is not None and self.hardware.hours is not None:
            return self.hardware.flops_per_s * self.hardware.hours * 3600, "full"
        return None

    @property
    def wanted_size(self) -> float | ModelSize | None:
        """The shape or the number of parameters that was given."""
        return self.size if self.size is not None else self.params


@dataclass(frozen=True)
class Bound:
    """A bound that kept the plan from the laws' optimum."""

    what: str
    cost: float
    """Share of the loss that it costs."""


@dataclass(frozen=True)
class Aim:
    """The optimum in real numbers, before any shape is chosen."""

    size: float
    """FLOPs per token by the laws' count."""
    flops: float
    """Budget by the laws' count."""
    unbounded: float
    """Loss at the budget's own optimum."""
    bounds: tuple[Bound, ...] = ()

    @property
    def tokens(self) -> float:
        """Number of training tokens."""
        return self.flops / self.size


def check_goal(goal: Goal) -> None:
    """Refuse a goal that determines nothing, or more than there is to determine.

    Raises:
        ConfigError: in one sentence.
    """
    given = {
        "a budget (FLOPs, or GPUs and hours)": goal.budget,
        "tokens": goal.tokens,
        "a model size": goal.wanted_size,
        "a loss": goal.loss,
    }
    found = [name for name, value in given.items() if value is not None]
    if not found:
        raise ConfigError(
            f"nothing determines the run; give one or two of {', '.join(list(given)[:-1])} and a loss to reach"
        )
    if len(found) > 2:
        raise ConfigError(f"{', '.join(found[:-1])} and {found[-1]} cannot all hold; give at most two of them")
    if goal.flops is not None and goal.hardware is not None and goal.hardware.hours is not None:
        raise ConfigError("FLOPs and the hours of the GPUs are two budgets; leave one of them out")
    numbers = {
        "the budget": goal.flops,
        "the number of tokens": goal.tokens,
        "the number of parameters": goal.params,
        "the loss": goal.loss,
    }
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be a positive number, found {value:g}")


def laws_for(goal: Goal, book: LawBook) -> Frontier:
    """Return the frontier that answers a goal: of the first file with its noise, by the budget's count if it can."""
    return frontier(book, goal.noise, None if goal.budget is None else goal.budget[1])


def annealing_ratio(book: LawBook, noise: str) -> float:
    """Return the loss before the cooldown over that after it; 1 if no law says."""
    law = book.law("annealing_ratio", noise=noise, form="constant")
    return 1.0 if law is None else law.value()


def aim(goal: Goal, laws: Frontier, annealing_ratio: float) -> Aim:
    """Return the best size and budget in real numbers.

    Raises:
        ConfigError: the goal cannot be reached, or lies too far from the laws' range.
    """
    check_goal(goal)
    flops, size = _aimed(goal, laws, None if goal.loss is None else goal.loss * annealing_ratio)
    limits = laws.loss_law.valid.get("flops")
    if limits is not None and not limits[0] / _FAR <= flops <= limits[1] * _FAR:
        raise ConfigError(
            f"the goal needs {flops:.3g} FLOPs, but the laws hold between {limits[0]:g} and {limits[1]:g}; more than "
            f"{_FAR:g} times outside of that nothing can be planned"
        )
    unbounded = laws.best_loss(flops)
    bounds: list[Bound] = []
    if goal.tokens is not None and goal.budget is not None and size > laws.best_size(flops) * 1.001:
        epochs = flops / size / goal.tokens
        wanted = flops / laws.best_size(flops)
        bounds.append(
            Bound(
                f"tokens: the optimum wants {wanted:.3g} and {goal.tokens:.3g} are at hand; the model is "
                f"{size / laws.best_size(flops):.3g} times larger and sees them {epochs:.3g} times",
                laws.loss(size, effective_tokens(flops / size, goal.tokens, laws.repeat_scale)) / unbounded - 1,
            )
        )
    return Aim(size, flops, unbounded, tuple(bounds))


def _aimed(goal: Goal, laws: Frontier, loss: float | None) -> tuple[float, float]:
    """Return (budget by the laws' count, FLOPs per token)."""
    fixed = None
    if goal.wanted_size is not None:
        fixed = shape_flops(_nearest_by_params(goal.params) if goal.size is None else goal.size, goal, laws.flop_count)
    if goal.budget is not None:
        flops = _converted(goal, laws, fixed)
        if fixed is not None:
            return flops, fixed
        if loss is not None:
            largest = laws.best_size(flops)
            return flops, laws.size_for_loss(lambda size: flops / size, loss, largest=largest)
        return flops, _size_for_data(goal, laws, flops)
    if goal.tokens is not None:
        tokens = goal.tokens
        if fixed is not None:
            return fixed * tokens, fixed
        flops = laws.budget_for_tokens(tokens)
        size = flops / tokens
        if loss is not None:
            size = laws.size_for_loss(lambda _: tokens, loss, largest=size * 1e3)
        return size * tokens, size
    if loss is not None:
        if fixed is not None:
            return fixed * laws.tokens_for_loss(fixed, loss), fixed
        flops = laws.budget_for_loss(loss)
        return flops, laws.best_size(flops)
    assert fixed is not None
    return laws.budget_for_size(fixed), fixed


def _converted(goal: Goal, laws: Frontier, fixed: float | None) -> float:
    """Return the budget by the laws' count; of another count it is converted at the shape that it is best spent on."""
    assert goal.budget is not None
    budget, count = goal.budget
    if count == laws.flop_count:
        return budget
    sizes = sorted((size for size in model_sizes() if size.oddness < 0.5), key=lambda size: size.params)
    flops = budget
    for _ in range(20):
        target = fixed or laws.best_size(flops)
        shape = min(sizes, key=lambda size: abs(math.log(shape_flops(size, goal, laws.flop_count) / target)))
        if isinstance(goal.wanted_size, ModelSize):
            shape = goal.wanted_size
        flops = budget * shape_flops(shape, goal, laws.flop_count) / shape_flops(shape, goal, count)
    return flops


def _size_for_data(goal: Goal, laws: Frontier, flops: float) -> float:
    """Return the best size for a budget, with the tokens at hand repeated as often as is best and allowed."""
    size, unique = laws.best_size(flops), goal.tokens
    if unique is None or flops / size <= unique:
        return size
    smallest = max(size, flops / (goal.max_epochs * unique))
    return _lowest(
        lambda m: laws.loss(m, effective_tokens(flops / m, unique, laws.repeat_scale)), smallest, smallest * 1e4
    )


def _lowest(value: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function with one minimum is least, by golden section over the logarithm."""
    golden = (math.sqrt(5) - 1) / 2
    left, right = math.log(low), math.log(high)
    for _ in range(100):
        one, two = right - golden * (right - left), left + golden * (right - left)
        left, right = (left, two) if value(math.exp(one)) < value(math.exp(two)) else (one, right)
    return math.exp(left)


def shape_flops(size: ModelSize, goal: Goal, count: FlopCount) -> float:
    """Return the training FLOPs of a token of a shape."""
    return size.flops_per_token(count, seq_length=goal.seq_length, vocab_size=goal.vocab_size)


def _nearest_by_params(params: float | None) -> ModelSize:
    assert params is not None
    return min(model_sizes(), key=lambda size: abs(math.log(size.params / params)) + 0.02 * size.oddness)


def _loss_at(goal: Goal, laws: Frontier, size: float, aimed: Aim) -> float:
    """Return the loss that the aim's budget gives with another size."""
    return laws.loss(size, effective_tokens(aimed.flops / size, goal.tokens, laws.repeat_scale))


def _best(goal: Goal, laws: Frontier, aimed: Aim) -> float:
    return _loss_at(goal, laws, aimed.size, aimed)


def size_cost(goal: Goal, laws: Frontier, aimed: Aim, size: float) -> float:
    """Return the share of the loss that a size costs against the best one for the same budget and data."""
    return _loss_at(goal, laws, size, aimed) / _loss_at(goal, laws, best_size(goal, laws, aimed), aimed) - 1


def best_size(goal: Goal, laws: Frontier, aimed: Aim) -> float:
    """Return the best FLOPs per token for the aim's budget, whatever size or loss was given."""
    is_bound_by_data = goal.budget is not None and goal.tokens is not None
    return aimed.size if is_bound_by_data else laws.best_size(aimed.flops)


def sizes(goal: Goal, laws: Frontier, aimed: Aim) -> list[ModelSize]:
    """Return the shapes that a run may take, the best choice first.

    Of the shapes whose loss is within the tolerance of the optimum, those near it with a usual ratio of width to depth
    come first. A shape or number of parameters that was given leaves no choice beyond shapes of that number.
    """
    if goal.size is not None:
        return [goal.size]
    params = goal.params
    if params is not None:
        near = [size for size in model_sizes() if abs(math.log(size.params / params)) < 0.05]
        near = near or [_nearest_by_params(params)]
        return sorted(near, key=lambda size: abs(math.log(size.params / params)) * 10 + size.oddness)
    best = _best(goal, laws, aimed)
    found = []
    for size in model_sizes():
        per_token = shape_flops(size, goal, laws.flop_count)
        if abs(math.log(per_token / aimed.size)) > 3:
            continue
        cost = _loss_at(goal, laws, per_token, aimed) / best - 1
        if goal.tokens is not None and aimed.flops / per_token > goal.tokens * goal.max_epochs * 1.05:
            continue
        if goal.loss is not None and goal.budget is None and goal.tokens is None and cost > goal.tolerance:
            continue
        if cost <= goal.tolerance or abs(math.log(per_token / aimed.size)) < 0.03:
            found.append((abs(math.log(per_token / aimed.size)) * 4 + size.oddness, size))
    if not found:
        raise ConfigError(
            f"no shape is within {100 * goal.tolerance:g} % of the optimum of {aimed.size:.3g} FLOPs per token; widen "
            "the tolerance, or give a shape"
        )
    return [size for _, size in sorted(found, key=lambda each: (each[0], each[1].params))]


def size_range(goal: Goal, laws: Frontier, aimed: Aim) -> tuple[float, float]:
    """Return the smallest and the largest FLOPs per token within the tolerance of the optimum."""
    middle_size = best_size(goal, laws, aimed)
    limit = _loss_at(goal, laws, middle_size, aimed) * (1 + goal.tolerance)
    ends = []
    for side in (-1, 1):
        near, far = 0.0, math.log(1e3)
        for _ in range(60):
            middle = (near + far) / 2
            is_within = _loss_at(goal, laws, middle_size * math.exp(side * middle), aimed) <= limit
            near, far = (middle, far) if is_within else (near, middle)
        ends.append(middle_size * math.exp(side * near))
    return ends[0], ends[1]
