"""Files of texts measured by an opened model, whatever its kind: what `tools/evaluate.py likelihood` prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megadiff.data.tokenizers import Tokenizer
from megadiff.diffusion.mixing_base import Mixing
from megadiff.diffusion.next_token import start_id
from megadiff.errors import ConfigError, DataError
from megadiff.eval.likelihood import BoundSettings, Item, Likelihood, bounds, exact
from megadiff.eval.rolling import pooled, rolled, rolling_items
from megadiff.eval.texts import item_of, read_lines


class Machine(Protocol):
    """Where a model lives."""

    @property
    def device(self) -> torch.device:
        """The device of its ids and logits."""
        ...


class RowLength(Protocol):
    """What is asked of a model's description."""

    @property
    def seq_length(self) -> int:
        """Tokens of a row."""
        ...


class Measured(Protocol):
    """A model that can be measured, such as `trained.TrainedModel`."""

    @property
    def is_autoregressive(self) -> bool:
        """Whether `answer` gives next tokens."""
        ...

    @property
    def mixing(self) -> Mixing:
        """The noise."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to tokens."""
        ...

    @property
    def model(self) -> RowLength:
        """Its description."""
        ...

    @property
    def platform(self) -> Machine:
        """Its machine."""
        ...

    def answer(self, ids: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Ids [B, L] and clean prompts' lengths [B] to logits [B, L, V]."""
        ...


@dataclass(frozen=True)
class Framing:
    """Special tokens around a text."""

    prepend_bos: bool = False
    """bos before the prompt or document: given, not scored."""
    score_eos: bool = False
    """eos behind the completion or document: scored, and no byte of it."""

    def ids(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What stands before and behind.

        Raises:
            ConfigError: a token asked for that the tokenizer does not have.
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


def likelihoods(model: Measured, items: Sequence[Item], settings: BoundSettings) -> list[Likelihood]:
    """Every item's likelihood: a bound of a diffusion model, exact of an autoregressive one."""
    if not model.is_autoregressive:
        return bounds(items, model.answer, mixing=model.mixing, settings=settings, device=model.platform.device)
    return exact(
        items,
        model.answer,
        start_id=start_id(model.tokenizer),
        mask_id=model.mixing.mask_id,
        vocab_size=model.mixing.vocab_size,
        batch_rows=settings.batch_rows,
        device=model.platform.device,
    )


def pairs_likelihood(
    model: Measured, path: Path, *, keys: tuple[str, str], settings: BoundSettings, framing: Framing
) -> dict[str, Any]:
    """Completions given prompts, one of each a line.

    Raises:
        DataError: a line that does not fit, or a text longer than the model's row.
    """
    start, end = framing.ids(model.tokenizer)
    items = []
    for number, (prompt, completion) in enumerate(read_lines(path, keys), start=1):
        item = item_of(prompt, completion, model.tokenizer, start=start, end=end)
        if len(item.ids) > model.model.seq_length:
            raise DataError(
                f"{path}: text {number} has {len(item.ids)} tokens, the model's row holds {model.model.seq_length}; "
                "shorten the prompt, or measure documents with --text-key"
            )
        items.append(item)
    found = likelihoods(model, items, settings)
    nll, stderr = math.fsum(one.nll for one in found), math.sqrt(math.fsum(one.stderr**2 for one in found))
    tokens = sum(one.tokens for one in found)
    return {
        "summary": f"{len(found)} completions of {tokens} tokens, {nll:.4f} +- {stderr:.4f} nats"
        + (f", {nll / tokens:.4f} per token" if tokens else ""),
        **_how(model, settings),
        "nll": nll,
        "nll_stderr": stderr,
        "tokens": tokens,
        "items": [{"nll": one.nll, "nll_stderr": one.stderr, "tokens": one.tokens} for one in found],
    }


def rolling_likelihood(
    model: Measured, path: Path, *, text_key: str, context: int, settings: BoundSettings, framing: Framing
) -> dict[str, Any]:
    """Whole documents, one a line, cut into windows of the model's row.

    Raises:
        DataError: a line that does not fit.
        ConfigError: a context that leaves no room.
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
    found = iter(likelihoods(model, [item for items in cut for item in items], settings))
    documents = [rolled([next(found) for _ in items], text) for items, text in zip(cut, texts, strict=True)]
    total = pooled(documents)
    error = total.as_json()["bits_per_byte_stderr"]
    return {
        "summary": f"{len(documents)} documents of {total.bytes} bytes, {total.bits_per_byte:.4f} +- {error:.4f} bits "
        f"per byte, word perplexity {total.word_perplexity:.4g}, byte perplexity {total.byte_perplexity:.4g}",
        **_how(model, settings),
        **total.as_json(),
        "documents": [one.as_json() for one in documents],
    }


def _how(model: Measured, settings: BoundSettings) -> dict[str, Any]:
    if model.is_autoregressive:
        return {"kind": "exact"}
    return {"kind": "bound", "estimator": settings.estimator, "draws": settings.draws, "seed": settings.seed}
