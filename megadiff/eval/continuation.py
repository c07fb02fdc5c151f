"""Continuations of contexts up to a stop string: batched by length, each request's draws its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megadiff.errors import ConfigError
from megadiff.eval.greedy import Sampled, batches, seed_of
from megadiff.eval.likelihood import Item
from megadiff.sampling.standalone import Settings, generate

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {*_LENGTH_NAMES, "until", "temperature", "do_sample", "top_k", "top_p"}
_DEFAULT_LENGTH = 256


@dataclass(frozen=True)
class Wish:
    """What a request asks of its continuation."""

    until: tuple[str, ...] = ()
    """The continuation ends before the first of these."""
    max_new_tokens: int = _DEFAULT_LENGTH
    temperature: float = 0.0
    """0 takes the most probable tokens."""
    top_k: int | None = None
    top_p: float | None = None
    unknown: tuple[str, ...] = ()
    """Names that mean nothing here."""

    @classmethod
    def from_names(cls, names: Mapping[str, Any]) -> Wish:
        """By the names a task's `generation_kwargs` use.

        `do_sample: false`, or neither it nor a temperature, is temperature 0; `do_sample: true` alone is 1.

        Raises:
            ConfigError: a value of the wrong kind or outside its range.
        """
        until = names.get("until") or ()
        samples, temperature = names.get("do_sample"), names.get("temperature")
        if temperature is None:
            temperature = 1.0 if samples else 0.0
        length = next((names[name] for name in _LENGTH_NAMES if names.get(name) is not None), _DEFAULT_LENGTH)
        try:
            wish = cls(
                until=(until,) if isinstance(until, str) else tuple(until),
                max_new_tokens=int(length),
                temperature=0.0 if samples is False else float(temperature),
                top_k=int(names["top_k"]) if names.get("top_k") else None,  # 0 is the usual word for no limit
                top_p=None if names.get("top_p") is None else float(names["top_p"]),
                unknown=tuple(sorted(set(names) - _KNOWN)),
            )
            if not all(isinstance(word, str) for word in wish.until):
                raise ValueError(f"until must hold strings, got {until}")
            Settings(max(wish.max_new_tokens, 0), temperature=wish.temperature, top_k=wish.top_k, top_p=wish.top_p)
            if wish.max_new_tokens < 1:
                raise ValueError(f"the number of new tokens must be at least 1, got {wish.max_new_tokens}")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a task's generation_kwargs cannot be met ({error}): {dict(names)}") from error
        return wish

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        for word in self.until:
            text = text.split(word, 1)[0] if word else text
        return text


@dataclass(frozen=True)
class Manner:
    """How continuations are drawn, beyond what a request says."""

    steps: int = 128
    """Denoising steps of a block."""
    block_length: int | None = None
    sampler: str = "adaptive"
    seed: int = 0
    batch_rows: int = 8


def room(prompt_length: int, wanted: int, *, length: int) -> tuple[int, int]:
    """(prompt tokens kept, new tokens) for a row: new tokens may take half of it, or whatever the prompt leaves free.

    So a long prompt loses its first tokens before a request of up to half a row is cut short.
    """
    new = min(wanted, max(length - prompt_length, length // 2))
    return min(prompt_length, length - new), new


def continuations(
    model: Sampled,
    requests: Sequence[tuple[str, Wish]],
    manner: Manner,
    *,
    start: Sequence[int] = (),
    progress: Callable[[int], None],
    say: Callable[[str], None],
) -> list[str]:
    """What the model writes behind each context, in their order.

    A continuation is a function of (seed, context, wish, how often the same was asked for before it in this list): not
    of the batch.

    Args:
        start: tokens before every context (bos), never cut off.
        progress: told how many requests have just been finished.
        say: told of a context or a continuation that is cut to the row, each time.

    Raises:
        ConfigError: the model is autoregressive.
    """
    if model.is_autoregressive:
        raise ConfigError(
            "this model is an autoregressive control, which is measured here but not sampled; leave out the tasks "
            "whose output_type is generate_until"
        )
    plans = _plans(model, requests, manner, tuple(start), say)
    numbers = {plan.settings: number for number, plan in enumerate(plans)}
    found = [""] * len(requests)
    for taken in batches(
        range(len(plans)), lambda i: (len(plans[i].prompt.prompt), numbers[plans[i].settings]), manner.batch_rows
    ):
        for i, text in zip(taken, _written(model, [plans[i] for i in taken], manner.seed), strict=True):
            found[i] = requests[i][1].cut(text)
        progress(len(taken))
    return found


@dataclass(frozen=True)
class _Plan:
    """A request as it is met."""

    prompt: Item
    """Its tokens, with no completion."""
    settings: Settings
    occurrence: int
    """How many requests before it were the same."""


def _plans(
    model: Sampled,
    requests: Sequence[tuple[str, Wish]],
    manner: Manner,
    start: tuple[int, ...],
    say: Callable[[str], None],
) -> list[_Plan]:
    plans, seen = [], Counter()
    length = model.model.seq_length - len(start)
    for context, wish in requests:
        ids = model.tokenizer.encode(context)
        kept, new = room(len(ids), wish.max_new_tokens, length=length)
        if new < wish.max_new_tokens:
            say(f"the model's row holds {model.model.seq_length} tokens; continuations end where it ends")
        if kept < len(ids):
            say(f"the model's row holds {model.model.seq_length} tokens; long contexts lose their first tokens")
        prompt, settings = Item((*start, *ids[len(ids) - kept :]), ()), _settings(model, wish, new, manner)
        plans.append(_Plan(prompt, settings, seen[prompt, settings]))
        seen[prompt, settings] += 1
    return plans


def _written(model: Sampled, plans: Sequence[_Plan], seed: int) -> list[str]:
    """What is written behind prompts of one length under one setting."""
    length = len(plans[0].prompt.prompt)
    ids = torch.tensor([plan.prompt.prompt for plan in plans], dtype=torch.int64).reshape(len(plans), length)
    written = generate(
        model.denoise,
        ids.to(model.platform.device),
        plans[0].settings,
        model.process,
        seed=[seed_of(seed, plan.prompt) for plan in plans],
        rows=torch.tensor([plan.occurrence for plan in plans]),
    )
    rows = zip(written.sequences.tolist(), written.new_tokens.tolist(), strict=True)
    return [_behind(model, row[: length + new], length) for row, new in rows]


def _settings(model: Sampled, wish: Wish, new: int, manner: Manner) -> Settings:
    low, high = model.process.sampling_range
    return Settings(
        max_new_tokens=new,
        max_denoising_steps=manner.steps,
        block_length=manner.block_length,
        sampler=manner.sampler,
        temperature=wish.temperature,
        top_k=wish.top_k,
        top_p=wish.top_p,
        eos_token_id=model.tokenizer.eos_id,
        pad_token_id=model.tokenizer.pad_id,
        min_log_snr=low,
        max_log_snr=high,
    )


def _behind(model: Sampled, row: list[int], prompt_length: int) -> str:
    """Text of the new tokens as it stands behind the prompt's, with the space between them."""
    before, whole = model.tokenizer.decode(row[:prompt_length]), model.tokenizer.decode(row)
    return whole[len(before) :] if whole.startswith(before) else model.tokenizer.decode(row[prompt_length:])
