"""Losses of count-based models on the validation data, for comparison with the validation bound.

*Unigram*: the entropy of the validation tokens' own frequencies. No model that ignores context can do better on these
tokens, so a bound below it shows that context is used.

*Bigram*: the cross-entropy on the validation tokens of a model that knows the token before, counted on training tokens
and smoothed towards the training frequencies by a Dirichlet prior (MacKay and Peto 1995, "A hierarchical Dirichlet
language model"). The prior's strength is fitted to the training tokens by leave-one-out, so validation tokens play no
part in it. The plain entropy of counted pairs would be far too low when there are many distinct pairs and few tokens
(it falls to zero as pairs become unique); the held-out figure errs on the other side, the more so the fewer training
tokens are counted.

Both use a bounded number of tokens, in contiguous spans spread evenly over each source. Counting 4 million tokens
takes about a second and 200 MB; the results are cached beside the validation data (`P.baselines.json`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megadiff.data.indexed_reader import IndexedReader
from megadiff.files import UnreadableFileError, read_json_object, write_atomically

TRAINING_TOKENS = 2**22
"""Maximal number of training tokens to count, over all sources."""

VALIDATION_TOKENS = 2**20
"""Maximal number of validation tokens to evaluate, over all sources."""

_SPANS = 64
_METHOD = 1  # increase this when the same tokens would give different results
_MAX_FILE_BYTES = 4096
_LOG_STRENGTHS = (math.log(1e-2), math.log(1e6))

Ids = npt.NDArray[np.int64]
Figures = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Baselines:
    """Losses of models without a network, in nats per validation token."""

    unigram: float
    """Entropy of the validation tokens' own frequencies."""
    bigram: float
    """Cross-entropy of a smoothed bigram model counted on training tokens."""
    bytes_per_token: float | None
    """Number of UTF-8 bytes of text per validation token; None if unknown."""
    training_tokens: int
    """Number of training tokens that were counted."""
    validation_tokens: int
    """Number of validation tokens that were evaluated."""

    def as_metrics(self) -> dict[str, float]:
        """Return the baselines under their keys in an evaluation line of `metrics.jsonl`."""
        return {"eval_unigram": self.unigram, "eval_bigram": self.bigram}

    def describe(self) -> str:
        """Return one line for the console."""
        return (
            f"unigram {self._both_units(self.unigram)} of {self.validation_tokens:,} validation tokens, "
            f"bigram {self._both_units(self.bigram)} counted on {self.training_tokens:,} training tokens"
        )

    def _both_units(self, nats: float) -> str:
        bits = f" ({nats / math.log(2) / self.bytes_per_token:.3f} bits per byte)" if self.bytes_per_token else ""
        return f"{nats:.4f} nats per token{bits}"


def baselines_of_data(
    training: Sequence[IndexedReader],
    training_weights: Sequence[float],
    validation: Sequence[IndexedReader],
    validation_weights: Sequence[float],
    *,
    vocab_size: int,
) -> Baselines:
    """Return the result of `count_baselines`, cached in `P.baselines.json` of the first validation source.

    The file holds a fingerprint of everything that the result depends on; a cache of other data is recounted and
    replaced. If the folder cannot be written, the only cost is the time of counting.

    Raises:
        DataError: tokens cannot be read.
    """
    contents = [[reader.content_fingerprint() for reader in readers] for readers in (training, validation)]
    weights = [[f"{w / sum(ws):.12g}" for w in ws] for ws in (training_weights, validation_weights)]
    facts = (_METHOD, contents, weights, vocab_size, TRAINING_TOKENS, VALIDATION_TOKENS, _SPANS)
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    path = Path(f"{validation[0].prefix}.baselines.json")
    if (kept := _kept(path, key)) is not None:
        return kept
    found = count_baselines(training, training_weights, validation, validation_weights, vocab_size=vocab_size)
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps({"data": key, **asdict(found)}) + "\n", is_durable=False)
    return found


def _kept(path: Path, key: str) -> Baselines | None:
    """Return the baselines cached in a file for these data; None if there are none, or the file is damaged."""
    try:
        found = read_json_object(path, max_bytes=_MAX_FILE_BYTES)
    except (OSError, UnreadableFileError):
        return None
    figures = {name: found.pop(name, None) for name in (field.name for field in fields(Baselines))}
    numbers = [value for name, value in figures.items() if name != "bytes_per_token" or value is not None]
    if found != {"data": key} or not all(type(n) in (int, float) and abs(n) < 1e15 for n in numbers):
        return None
    return Baselines(**figures)


def count_baselines(
    training: Sequence[IndexedReader],
    training_weights: Sequence[float],
    validation: Sequence[IndexedReader],
    validation_weights: Sequence[float],
    *,
    vocab_size: int,
) -> Baselines:
    """Count both baselines from bounded samples of the sources.

    Args:
        training: the sources to count.
        training_weights: share of each in training, in any unit.
        validation: the sources to evaluate, at least one.
        validation_weights: share of each in the validation bound, in any unit, such as its sequences.
        vocab_size: V.

    Raises:
        DataError: tokens cannot be read.
    """
    counted = _spans_of(training, training_weights, TRAINING_TOKENS)
    measured = _spans_of(validation, [1.0] * len(validation), VALIDATION_TOKENS)
    shares = np.asarray(validation_weights, dtype=np.float64) / sum(validation_weights)
    frequencies = np.zeros(vocab_size)
    for share, spans in zip(shares, measured, strict=True):
        counts = _token_counts(spans, vocab_size)
        frequencies += share * counts / counts.sum()
    model = SmoothedBigrams([span for spans in counted for span in spans], vocab_size=vocab_size)
    losses = [-np.concatenate([model.log_likelihood(span) for span in spans]).mean() for spans in measured]
    ratios = [reader.bytes_per_token for reader in validation]
    return Baselines(
        unigram=entropy(frequencies),
        bigram=float(shares @ np.array(losses)),
        bytes_per_token=None if None in ratios else float(shares @ np.array(ratios, dtype=np.float64)),
        training_tokens=sum(span.size for spans in counted for span in spans),
        validation_tokens=sum(span.size for spans in measured for span in spans),
    )


def unigram_entropy(reader: IndexedReader, *, vocab_size: int) -> float:
    """Return the entropy in nats per token of a source's token frequencies, from up to `VALIDATION_TOKENS` tokens."""
    counts = _token_counts(list(_spans(reader, VALIDATION_TOKENS)), vocab_size)
    return entropy(counts / counts.sum())


def bigram_entropy(reader: IndexedReader, *, vocab_size: int) -> float | None:
    """Return the cross-entropy in nats per token of one source's tokens given the one before.

    The source is cut into `_SPANS` spans, or an even sample of it where it is long. A smoothed model counted on four
    of five spans is evaluated on the fifth, since the entropy of the counted pairs themselves would be far too low.
    None for a source of less than two tokens a span.
    """
    length = min(reader.num_tokens, TRAINING_TOKENS + VALIDATION_TOKENS) // _SPANS
    if length < 2:
        return None
    last = reader.num_tokens - length
    spans = [reader.tokens(last * place // (_SPANS - 1), length) for place in range(_SPANS)]
    model = SmoothedBigrams([span for place, span in enumerate(spans) if place % 5], vocab_size=vocab_size)
    return -float(np.concatenate([model.log_likelihood(span) for span in spans[::5]]).mean())


class SmoothedBigrams:
    """A bigram model with a Dirichlet prior: p(b | a) = (n(a, b) + k p(b)) / (n(a) + k).

    Here n counts the training tokens, p is their frequency with half a token added to every entry, and the prior's
    strength k maximises the leave-one-out likelihood of the training pairs.

    Args:
        spans: training tokens; pairs do not cross the ends of a span.
        vocab_size: V.
    """

    def __init__(self, spans: Sequence[Ids], *, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        counts = _token_counts(spans, vocab_size) + 0.5
        self._frequency = counts / counts.sum()
        pairs = np.concatenate([_pairs(span, vocab_size) for span in spans])
        self._pairs, self._pair_counts = np.unique(pairs, return_counts=True)
        self._first_counts = np.bincount(self._pairs // vocab_size, weights=self._pair_counts, minlength=vocab_size)
        self.strength = self._fitted_strength()

    def log_likelihood(self, span: Ids) -> Figures:
        """Return the natural logarithm of each token's probability given the previous one, [n].

        Args:
            span: contiguous tokens, [n]; the first one has no predecessor and gets its frequency.
        """
        pairs = _pairs(span, self._vocab_size)
        place = np.minimum(np.searchsorted(self._pairs, pairs), max(len(self._pairs) - 1, 0))
        seen = np.where(self._pairs[place] == pairs, self._pair_counts[place], 0) if len(self._pairs) else 0.0 * pairs
        prior = self.strength * self._frequency[span[1:]]
        after = np.log((seen + prior) / (self._first_counts[span[:-1]] + self.strength))
        return np.concatenate((np.log(self._frequency[span[:1]]), after))

    def _fitted_strength(self) -> float:
        """Return the prior's strength with the highest leave-one-out likelihood of the training pairs."""
        first, second = np.divmod(self._pairs, self._vocab_size)
        others = self._pair_counts - 1.0
        prior, totals = self._frequency[second], self._first_counts[first] - 1.0

        def loss(log_strength: float) -> float:
            strength = math.exp(log_strength)
            return -float(self._pair_counts @ np.log((others + strength * prior) / (totals + strength)))

        return math.exp(_lowest(loss, *_LOG_STRENGTHS, within=0.02))


def _lowest(function: Callable[[float], float], low: float, high: float, *, within: float) -> float:
    """Return the minimiser of a unimodal function between `low` and `high`, by golden-section search."""
    share = (math.sqrt(5) - 1) / 2
    left, right = high - share * (high - low), low + share * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > within:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - share * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + share * (high - low)
            at_right = function(right)
    return (low + high) / 2


def _spans_of(readers: Sequence[IndexedReader], weights: Sequence[float], limit: int) -> list[list[Ids]]:
    """Return contiguous spans of tokens of each source: all of it, or an even sample of its share of `limit`."""
    shares = [limit * weight / sum(weights) for weight in weights]
    return [list(_spans(reader, max(1, int(share)))) for reader, share in zip(readers, shares, strict=True)]


def _spans(reader: IndexedReader, limit: int) -> Iterator[Ids]:
    if reader.num_tokens <= limit:
        yield reader.tokens(0, reader.num_tokens)
        return
    spans = max(1, min(_SPANS, limit))
    length = limit // spans
    last = reader.num_tokens - length
    for place in range(spans):
        yield reader.tokens(last * place // max(spans - 1, 1), length)


def _token_counts(spans: Sequence[Ids], vocab_size: int) -> Figures:
    counts = np.zeros(vocab_size)
    for span in spans:
        counts += np.bincount(span, minlength=vocab_size)
    return counts


def _pairs(span: Ids, vocab_size: int) -> Ids:
    """Return each pair of neighbouring tokens as one number: a V + b, [n - 1]."""
    return span[:-1] * vocab_size + span[1:]


def entropy(frequencies: Figures) -> float:
    """Return the entropy of a distribution in nats."""
    present = frequencies[frequencies > 0]
    return float(-(present * np.log(present)).sum())
