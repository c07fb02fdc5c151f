"""Likelihoods of files of texts under any opened model, whole documents window by window."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadiff.config.suggestions import similar_path
from megadiff.data.conversations import split_completion
from megadiff.data.corpus_files import NotJson, parse_json_line, without_lone_surrogates
from megadiff.data.preprocess import ProgressReport
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import ConfigError, DataError, shown
from megadiff.eval.likelihood import BoundSettings, Estimator, EvaluatedModel, Item, Likelihood, sequences_read, summed

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def split_to_fit(item: Item, *, length: int, start: Sequence[int] = ()) -> list[Item]:
    """Return the item in pieces that fit into a sequence, each a factor of its likelihood; one piece if possible.

    A prompt that is too long loses its first tokens. A completion that fills a sequence by itself is scored window
    after window: the first after the last half sequence of the prompt, each later one after the half sequence before
    it.

    Args:
        item: prompt and completion, without the tokens before every prompt.
        length: tokens of a sequence, at least 2 more than `start`.
        start: tokens before every prompt (bos); they are never cut off.
    """
    start, room = tuple(start), length - len(start)
    if len(item.completion) >= room:
        half = max(1, length // 2)
        before = (*start, *_last(item.prompt, half - len(start)))
        return rolling_items(item.completion, length=length, context=half, start=before)
    return [Item((*start, *_last(item.prompt, room - len(item.completion))), item.completion)]


def is_cut(item: Item, *, length: int, start: Sequence[int] = ()) -> bool:
    """Return whether `split_to_fit` drops tokens or cuts the item into pieces."""
    return len(start) + len(item.ids) > length


def _last(ids: tuple[int, ...], count: int) -> tuple[int, ...]:
    return ids[len(ids) - count :] if 0 < count < len(ids) else ids if count > 0 else ()


def read_lines(path: Path, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the strings under `keys` of every line of a .jsonl file; empty lines are skipped.

    Raises:
        DataError: there is no such file, it is empty, or a line is not an object with strings under these keys.
    """
    if not path.is_file():
        near = similar_path(path, Path.is_file) if not path.exists() else None
        hint = f"; did you mean {near}?" if near is not None else ""
        raise DataError(f"{path}: wanted a .jsonl file, found {'a folder' if path.is_dir() else 'nothing'}{hint}")
    found = []
    for number, line in enumerate(path.read_bytes().removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        if line.strip():
            found.append(_strings(_parsed(line, f"{path}:{number}"), keys, f"{path}:{number}"))
    if not found:
        raise DataError(f"{path}: wanted one JSON object a line, found an empty file")
    return found


def item_of(
    prompt: str, completion: str, tokenizer: Tokenizer, *, start: Sequence[int] = (), end: Sequence[int] = ()
) -> Item:
    """Return the tokens of a completion after its prompt.

    They are split as training data of prompts and completions are (`split_completion`).

    Args:
        prompt: text before the completion.
        completion: text to score.
        tokenizer: the model's tokenizer.
        start: tokens before the prompt (bos), given and not scored.
        end: tokens after the completion (eos), scored.
    """
    before, after = split_completion(prompt, completion, tokenizer)
    return Item((*start, *before), (*after, *end))


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    value = parse_json_line(line)
    if isinstance(value, NotJson):
        raise DataError(f"{where}: wanted a JSON object, found text that is none ({value.why})")
    if not isinstance(value, dict):
        raise DataError(f"{where}: wanted a JSON object, found {shown(value)}")
    return value


def _strings(value: dict[str, Any], keys: Sequence[str], where: str) -> tuple[str, ...]:
    for key in keys:
        if not isinstance(value.get(key), str):
            found = "nothing" if key not in value else shown(value[key])
            raise DataError(
                f"{where}: wanted a string under {key!r}, found {found}; the keys here are {sorted(value)}; choose "
                "with --prompt-key and --completion-key, or --text-key for whole documents"
            )
    return tuple(without_lone_surrogates(value[key]) for key in keys)


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
        "summary": f"{len(items)} completion(s) of {total.tokens} tokens, {total.nll:.4f} +- {total.stderr:.4f} nats"
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
        "summary": f"{len(documents)} document(s) of {total.bytes} bytes, {total.bits_per_byte:.4f} +- {error:.4f} "
        f"bits per byte, word perplexity {total.word_perplexity:.4g}, byte perplexity {total.byte_perplexity:.4g}"
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
    if not count:
        raise DataError("the texts have no token to score: all of them are empty; give at least one that is not")
    sys.stderr.write(f"measuring {count // draws:,} distinct text(s), {draws} sequences each: {count:,} sequences\n")
    started, done = time.monotonic(), 0
    with ProgressReport("sequences", count) as report:

        def progress(read: int) -> None:
            nonlocal done
            done += read
            left = (time.monotonic() - started) * (count - done) / done
            report.update(done, f"{done:,} of {count:,}, about {left:,.0f} s left")

        found = estimator.likelihoods(model, items, progress=progress)
    return dict(zip(items, found, strict=True))
