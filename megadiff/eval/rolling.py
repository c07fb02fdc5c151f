"""Rolling likelihood of whole documents, longer than a model's sequence, as word and byte perplexity and bits per
byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megadiff.eval.likelihood import Item, Likelihood


@dataclass(frozen=True)
class RollingResult:
    """Result for one document or several together."""

    nll: float
    """Negative log-likelihood in nats, over all tokens; a bound for a diffusion model."""
    stderr: float
    tokens: int
    words: int
    """Number of runs of characters between white space."""
    bytes: int
    """Number of UTF-8 bytes of the text; end tokens add none."""

    @property
    def word_perplexity(self) -> float:
        """exp(nll / words)."""
        return _exp(self.nll / self.words) if self.words else math.nan

    @property
    def byte_perplexity(self) -> float:
        """exp(nll / bytes)."""
        return _exp(self.nll / self.bytes) if self.bytes else math.nan

    @property
    def bits_per_byte(self) -> float:
        """nll / (bytes log 2)."""
        return self.nll / self.bytes / math.log(2) if self.bytes else math.nan

    def as_json(self) -> dict[str, float | int]:
        """Return every figure with its standard error; those of the perplexities are to first order."""
        word_error, byte_error = (self.stderr / count if count else math.nan for count in (self.words, self.bytes))
        return {
            "nll": self.nll,
            "nll_stderr": self.stderr,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "word_perplexity": self.word_perplexity,
            "word_perplexity_stderr": self.word_perplexity * word_error,
            "byte_perplexity": self.byte_perplexity,
            "byte_perplexity_stderr": self.byte_perplexity * byte_error,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_stderr": byte_error / math.log(2),
        }


def rolling_items(ids: Sequence[int], *, length: int, context: int, start: Sequence[int] = ()) -> list[Item]:
    """Cut a document into items so that every token is a completion token exactly once.

    Args:
        ids: the document's tokens, with its end token if that is to be scored.
        length: tokens of a sequence, prompt and completion together.
        context: maximal number of preceding tokens given as a window's clean prompt; 0 evaluates windows independently.
        start: tokens before the first one (bos), given and not scored.

    Raises:
        ValueError: the context leaves no room for a completion.
    """
    if not 0 <= max(context, len(start)) < length:
        raise ValueError(f"the context ({context} tokens) must be shorter than a sequence ({length})")
    items, place = [], 0
    while place < len(ids):
        prompt = tuple(start) if place == 0 else tuple(ids[max(0, place - context) : place])
        stop = min(len(ids), place + length - len(prompt))
        items.append(Item(prompt, tuple(ids[place:stop])))
        place = stop
    return items


def rolled(measured: Likelihood, text: str) -> RollingResult:
    """Return a document's figures from the likelihood of all its windows together (`likelihood.summed`)."""
    return RollingResult(
        nll=measured.nll,
        stderr=measured.stderr,
        tokens=measured.tokens,
        words=len(text.split()),
        bytes=len(text.encode("utf-8")),
    )


def pooled(measured: Likelihood, documents: Sequence[RollingResult]) -> RollingResult:
    """Return several documents as one: sums of everything, so that documents count by their length.

    Args:
        measured: the likelihood of all windows of all documents together (`likelihood.summed`): documents that have
            windows in common share those windows' errors, which the documents' own results do not show.
        documents: the documents one by one, for their words and bytes.
    """
    return RollingResult(
        nll=measured.nll,
        stderr=measured.stderr,
        tokens=measured.tokens,
        words=sum(one.words for one in documents),
        bytes=sum(one.bytes for one in documents),
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
