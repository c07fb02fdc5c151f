"""The loss of any size and number of tokens that the laws of the optimum imply, and the shapes of models of a size.

The laws give the best loss L*(C) = A C^-gamma and the best size M*(C) ~ C^m. They are the optimum of a surface
L = a M^-alpha + b D^-beta with alpha = gamma / m and beta = gamma / (1 - m), and of no other sum of two powers. A model
of r times the best size for its budget then has the loss

    L = L*(C) (beta r^-alpha + alpha r^beta) / (alpha + beta)

which is flat: at r = 2 or 1/2 it is a quarter of a percent above L*. A floor of L* is kept apart and added again.

Symbols: M training FLOPs per token, D tokens, C = M D.

The paper's models have 64 features of width for each layer up to width 1024, and 77 to 171 beyond. The usual ratio here
is 64, growing with the root of the width from 1024 on; a shape has that within a factor of 1.6. Widths below 64, for
studies on a CPU, have one layer and one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megadiff.errors import ConfigError
from megadiff.scaling.flops import FlopCount, flops_per_token, paper_params
from megadiff.scaling.laws import Law, LawBook, LawFile, known_noise

_SPREAD = 1.6
"""Largest factor between a shape's ratio of width to depth and the usual one."""
_WIDTHS = (
    *range(16, 64, 8),
    *range(64, 1024, 64),
    *range(1024, 2048, 128),
    *range(2048, 8192, 256),
    *range(8192, 32769, 512),
)


@dataclass(frozen=True)
class ModelSize:
    """Depth and width of a model, with heads of 64 features up to width 1024 and of 128 beyond.

    A width that is no multiple of these has the largest number of heads that are not narrower, all of an even width.
    """

    layers: int
    hidden: int

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        head_dim = 128 if self.hidden > 1024 and self.hidden % 128 == 0 else 64
        most = max(1, self.hidden // head_dim)
        return next((heads for heads in range(most, 0, -1) if self.hidden % (2 * heads) == 0), 1)

    @property
    def params(self) -> int:
        """Number of parameters without embedding and head, as the paper counts them."""
        return paper_params(self.layers, self.hidden)

    @property
    def name(self) -> str:
        """Short name, as in L20-D1536."""
        return f"L{self.layers}-D{self.hidden}"

    @property
    def oddness(self) -> float:
        """Distance from the usual ratio of width to depth, at most 1, and a little more for an odd number of layers."""
        apart = abs(math.log(self.hidden / self.layers / usual_ratio(self.hidden))) / math.log(_SPREAD)
        return apart + (0.1 if self.layers % 2 else 0.0)

    def flops_per_token(self, count: FlopCount, *, seq_length: int, vocab_size: int) -> float:
        """Return the training FLOPs of a token."""
        return flops_per_token(self.layers, self.hidden, seq_length, method=count, vocab_size=vocab_size)


def usual_ratio(hidden: int) -> float:
    """Return the usual ratio of width to depth."""
    return 64 * math.sqrt(max(1.0, hidden / 1024))


def model_sizes() -> Iterator[ModelSize]:
    """Yield all shapes, narrow ones first."""
    for hidden in _WIDTHS:
        usual = hidden / usual_ratio(hidden)
        for layers in range(max(1, math.ceil(usual / _SPREAD)), max(2, math.floor(usual * _SPREAD) + 1)):
            yield ModelSize(layers, hidden)


REPEAT_SCALE = 15.0
"""Number R* of repetitions after which more of them teach little, arXiv:2305.16264; measured for autoregressive models
alone, which gain less from repetition than diffusion models are said to."""

_LEAST, _MOST = 1e3, 1e40
"""Ends between which budgets, sizes and numbers of tokens are looked for."""


@dataclass(frozen=True)
class Frontier:
    """Best loss and size over the budget for one noise, and the loss away from the optimum."""

    noise: str
    flop_count: FlopCount
    loss_law: Law
    """Power law of the best loss over FLOPs, or the surface itself."""
    size_law: Law | None
    """Power law of the best FLOPs per token; None if the loss is a surface."""
    tokens_law: Law | None = None
    """Power law of the best number of tokens; None to take FLOPs over FLOPs per token."""
    repeat_scale: float = REPEAT_SCALE
    """Number R* of repetitions after which more of them teach little."""

    @property
    def _exponents(self) -> tuple[float, float]:
        """(alpha, beta) of the implied or given surface."""
        if self.size_law is None:
            return self.loss_law.parameter("alpha"), self.loss_law.parameter("beta")
        gamma, share = -self.loss_law.parameter("alpha"), self.size_law.parameter("alpha")
        return gamma / share, gamma / (1 - share)

    @property
    def floor(self) -> float:
        """Loss that no budget goes below."""
        name = "E" if self.size_law is None else "floor"
        return self.loss_law.parameter(name) if name in self.loss_law.parameters else 0.0

    @property
    def curvature(self) -> float:
        """Second derivative of log L over log M at the optimum, for a loss without a floor: alpha beta."""
        alpha, beta = self._exponents
        return alpha * beta

    def best_size(self, flops: float) -> float:
        """Return the best FLOPs per token for a budget."""
        if self.size_law is not None:
            return self.size_law.value(flops)
        alpha, beta = self._exponents
        a, b = self.loss_law.parameter("a"), self.loss_law.parameter("b")
        return (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * flops ** (beta / (alpha + beta))

    def best_tokens(self, flops: float) -> float:
        """Return the best number of tokens for a budget."""
        return flops / self.best_size(flops) if self.tokens_law is None else self.tokens_law.value(flops)

    def best_loss(self, flops: float) -> float:
        """Return the best loss for a budget."""
        if self.size_law is not None:
            return self.loss_law.value(flops)
        size = self.best_size(flops)
        return self.loss_law.value(size, flops / size)

    def loss(self, size: float, tokens: float) -> float:
        """Return the loss of a model of this size, in FLOPs per token, after this number of tokens."""
        if self.size_law is None:
            return self.loss_law.value(size, tokens)
        alpha, beta = self._exponents
        flops = size * tokens
        ratio = size / self.best_size(flops)
        above = (beta * ratio**-alpha + alpha * ratio**beta) / (alpha + beta)
        return self.floor + (self.best_loss(flops) - self.floor) * above

    def interval(self, size: float, tokens: float) -> tuple[float, float] | None:
        """Return the ends of the interval of the loss, as far as the law of the best loss has one."""
        flops, loss = size * tokens, self.loss(size, tokens)
        if self.size_law is None:
            return self.loss_law.interval(size, tokens)
        ends = self.loss_law.interval(flops)
        best = self.best_loss(flops)
        return None if ends is None else (loss * ends[0] / best, loss * ends[1] / best)

    def budget_for_loss(self, loss: float) -> float:
        """Return the smallest budget that reaches a loss.

        Raises:
            ConfigError: none does.
        """
        if loss <= self.floor:
            raise ConfigError(f"a loss of {loss:g} is never reached: the law's floor is {self.floor:g}")
        found = _root(lambda flops: loss - self.best_loss(flops))
        if found is None:
            raise ConfigError(f"a loss of {loss:g} nats per token is out of reach of the law")
        return found

    def budget_for_tokens(self, tokens: float) -> float:
        """Return the budget whose best run has this number of tokens."""
        found = _root(lambda flops: flops / self.best_size(flops) - tokens)
        assert found is not None
        return found

    def budget_for_size(self, size: float) -> float:
        """Return the budget for which this size is best."""
        found = _root(lambda flops: self.best_size(flops) - size)
        assert found is not None
        return found

    def tokens_for_loss(self, size: float, loss: float) -> float:
        """Return the number of tokens after which a model of this size has a loss.

        Raises:
            ConfigError: the model is too small to get there.
        """
        found = _root(lambda tokens: loss - self.loss(size, tokens))
        if found is None:
            raise ConfigError(
                f"a model of {size:.3g} FLOPs per token never reaches a loss of {loss:g}; take a larger one"
            )
        return found

    def size_for_loss(self, tokens: Callable[[float], float], loss: float, *, largest: float) -> float:
        """Return the smallest size that reaches a loss.

        Args:
            tokens: number of tokens that a size is trained on.
            loss: the loss wanted.
            largest: size beyond which a larger model is no better.

        Raises:
            ConfigError: none does.
        """
        best = self.loss(largest, tokens(largest))
        if best > loss:
            raise ConfigError(f"a loss of {loss:g} is out of reach: the best that this budget gives is {best:.4g}")
        found = _root(lambda size: loss - self.loss(size, tokens(size)), high=largest)
        return largest if found is None else found


def frontier(book: LawBook, noise: str, flop_count: FlopCount | None = None) -> Frontier:
    """Return the frontier of a noise, from the first file that has laws for it.

    A user's own file comes first, whatever its count of FLOPs; budgets of another count are converted.

    Args:
        book: the files.
        noise: name of the noise.
        flop_count: count of FLOPs whose laws are preferred if a file has laws of several.

    Raises:
        ConfigError: there are none.
    """
    name = known_noise(noise, book.plannable)
    counts: tuple[FlopCount, ...] = ("deepseek", "chinchilla", "full")
    for file in book.files:
        for count in (flop_count, *counts) if flop_count else counts:
            if (found := _of_file(file, name, count)) is not None:
                repeats = book.law("repeat_scale", noise=name, form="constant")
                return found if repeats is None else replace(found, repeat_scale=repeats.value())
    raise ConfigError(f"the law files have no law of the loss of {noise} noise together with its best size")


def _of_file(file: LawFile, noise: str, count: FlopCount) -> Frontier | None:
    alone = LawBook((file,))
    loss, size, tokens = (
        alone.law(quantity, noise=noise, flop_count=count) for quantity in ("loss", "flops_per_token", "tokens")
    )
    if loss is not None and size is not None:
        share, gamma = size.parameter("alpha"), -loss.parameter("alpha")
        if not (0 < share < 1 and gamma > 0):
            raise ConfigError(
                f"the laws of {file.name} for {noise} noise cannot be planned with: M* must grow with an exponent "
                f"between 0 and 1 and L* must fall, found {share:g} and {-gamma:g}; fit more runs"
            )
        return Frontier(noise, count, loss, size, tokens)
    surface = alone.law("loss", noise=noise, flop_count=count, form="surface")
    return None if surface is None else Frontier(noise, count, surface, None)


def effective_tokens(tokens: float, unique: float | None, scale: float = REPEAT_SCALE) -> float:
    """Return the number of new tokens that are worth as much as `tokens` of which only `unique` differ.

    With R = tokens / unique - 1 repetitions it is unique (1 + R* (1 - exp(-R / R*))), arXiv:2305.16264, with R* the
    `scale`.
    """
    if unique is None or tokens <= unique:
        return tokens
    repeats = tokens / unique - 1
    return unique * (1 + scale * -math.expm1(-repeats / scale))


def wasted_by_batch(ratio: float, law: Law | None) -> float:
    """Return the factor by which a batch of `ratio` times the best needs more tokens for the same loss.

    On the hyperbola ((S / S_min)^g - 1) ((B / B_min)^g - 1) = 1, whose best batch is 2^(1/g) B_min, it is
    ratio^2 / (2 ratio^g - 1)^(1/g); infinite for a batch below B_min. Without a law nothing is known, and it is 1.
    """
    if law is None:
        return 1.0
    g = law.parameter("g")
    inside = 2 * ratio**g - 1
    return math.inf if inside <= 0 else ratio**2 / inside ** (1 / g)


def _root(rising: Callable[[float], float], *, low: float = _LEAST, high: float = _MOST) -> float | None:
    """Return where a rising function crosses zero; None if it does not between the ends."""
    if rising(low) > 0 or rising(high) < 0:
        return None
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return math.sqrt(low * high)
