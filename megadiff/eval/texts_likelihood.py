"""Likelihoods of files of texts under any opened model, which `tools/evaluate.py likelihood` prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.data.progress import ProgressReport
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import ConfigError, DataError
from megadiff.eval.estimators import Estimator, EvaluatedModel
from megadiff.eval.likelihood import BoundSettings, Item, Likelihood, sequences_read, summed
from megadiff.eval.rolling import pooled, rolled, rolling_items
from megadiff.eval.texts import item_of, read_lines


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens around a text."""

    prepend_bos: bool = False
    """Whether bos comes before the prompt or document: given, not scored."""
    score_eos: bool = False
    """Whether eos comes after the completion or document: scored, and counted as no byte."""

    @classmethod
    def like_the_data(
        cls, model: EvaluatedModel, *, prepend_bos: bool | None = None, score_eos: bool = False
    ) -> SpecialTokens:
        """Return the requested framing, by default that of the model's training data.

        Args:
            model: the model to be evaluated or sampled; if its method puts a start token before every sequence anyway,
                prompts get no second one unless requested.
            prepend_bos: whether bos comes before a prompt; None follows the training data.
            score_eos: whether eos is scored after a completion.
        """
        as_trained = model.prepends_bos and not model.adds_start_token
        return cls(prepend_bos=as_trained if prepend_bos is None else prepend_bos, score_eos=score_eos)

    def ids(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the ids before and after a text.

        Raises:
            ConfigError: the tokenizer lacks a requested token.
        """
        for wanted, token, option in (
            (self.prepend_bos, tokenizer.bos_id, "--prepend-bos"),
            (self.score_eos, tokenizer.eos_id, "--score-eos"),
        ):
            if wanted and token is None:
                raise ConfigError(f"{option}: the tokenizer {tokenizer.name} has no such token; leave the option out")
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        return ((bos,) if self.prepend_bos and bos is not None else ()), (
            (eos,) if self.score_eos and eos is not None else ()
        )


def pairs_likelihood(
    model: EvaluatedModel, path: Path, *, keys: tuple[str, str], settings: BoundSettings, framing: SpecialTokens
) -> dict[str, Any]:
    """Evaluate completions given prompts, one pair per line.

    Raises:
        DataError: a line has the wrong format, or a text is longer than the model's sequence.
    """
    start, end = framing.ids(model.tokenizer)
    items = []
    for number, (prompt, completion) in enumerate(read_lines(path, keys), start=1):
        item = item_of(prompt, completion, model.tokenizer, start=start, end=end)
        if len(item.ids) > model.model.seq_length:
            raise DataError(
                f"{path}: text {number} has {len(item.ids)} tokens, the model's sequence holds "
                f"{model.model.seq_length}; shorten the prompt, or measure documents with --text-key"
            )
        items.append(item)
    estimator = model.estimator(settings)
    found = _measured(model, estimator, items)
    total = summed(items, found)
    own = [found[item] for item in items]
    return {
        "summary": f"{len(items)} completions of {total.tokens} tokens, {total.nll:.4f} +- {total.stderr:.4f} nats"
        + (f", {total.nll / total.tokens:.4f} per token" if total.tokens else "")
        + f" ({estimator.coverage})",
        **estimator.record(),
        "prepend_bos": framing.prepend_bos,
        "nll": total.nll,
        "nll_stderr": total.stderr,
        "tokens": total.tokens,
        "items": [{"nll": one.nll, "nll_stderr": one.stderr, "tokens": one.tokens} for one in own],
    }


def rolling_likelihood(
    model: EvaluatedModel, path: Path, *, text_key: str, context: int, settings: BoundSettings, framing: SpecialTokens
) -> dict[str, Any]:
    """Evaluate whole documents, one per line, cut into windows of the model's sequence.

    Raises:
        DataError: a line has the wrong format.
        ConfigError: the context leaves no room for a completion.
    """
    start, end = framing.ids(model.tokenizer)
    texts = [text for (text,) in read_lines(path, [text_key])]
    try:
        cut = [
            rolling_items(
                [*model.tokenizer.encode(text), *end], length=model.model.seq_length, context=context, start=start
            )
            for text in texts
        ]
    except ValueError as error:
        raise ConfigError(f"--context {context}: {error}") from error
    windows = [item for items in cut for item in items]
    estimator = model.estimator(settings)
    found = _measured(model, estimator, windows)
    documents = [rolled(summed(items, found), text) for items, text in zip(cut, texts, strict=True)]
    total = pooled(summed(windows, found), documents)
    error = total.as_json()["bits_per_byte_stderr"]
    return {
        "summary": f"{len(documents)} documents of {total.bytes} bytes, {total.bits_per_byte:.4f} +- {error:.4f} bits "
        f"per byte, word perplexity {total.word_perplexity:.4g}, byte perplexity {total.byte_perplexity:.4g}"
        f" ({estimator.coverage})",
        **estimator.record(),
        "prepend_bos": framing.prepend_bos,
        **total.as_json(),
        "documents": [one.as_json() for one in documents],
    }


def _measured(model: EvaluatedModel, estimator: Estimator, items: Sequence[Item]) -> dict[Item, Likelihood]:
    """Return each distinct item's likelihood; report the amount of work and the progress on stderr."""
    draws = estimator.draws
    count = sequences_read(items, draws=draws)
    sys.stderr.write(f"measuring {count // draws:,} distinct texts, {draws} sequences each: {count:,} sequences\n")
    started, done = time.monotonic(), 0
    with ProgressReport("sequences", count) as report:

        def progress(read: int) -> None:
            nonlocal done
            done += read
            left = (time.monotonic() - started) * (count - done) / done
            report.update(done, f"{done:,} of {count:,}, about {left:,.0f} s left")

        found = estimator.likelihoods(model, items, progress=progress)
    return dict(zip(items, found, strict=True))
