"""Continuations of contexts up to a stop string, batched by length, with random draws keyed by each request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megadiff.errors import ConfigError
from megadiff.eval.estimators import EvaluatedModel, batches
from megadiff.eval.likelihood import Item, seed_of
from megadiff.sampling.sampler import Sampler
from megadiff.sampling.standalone import Settings

_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {*_LENGTH_NAMES, "until", "temperature", "do_sample", "top_k", "top_p"}
_DEFAULT_LENGTH = 256


@dataclass(frozen=True)
class GenerationRequest:
    """The generation settings of one request."""

    until: tuple[str, ...] = ()
    """Stop strings; the continuation ends before the first of these."""
    max_new_tokens: int = _DEFAULT_LENGTH
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most probable tokens."""
    top_k: int | None = None
    top_p: float | None = None
    unknown: tuple[str, ...] = ()
    """Names of settings that this model does not support."""

    @classmethod
    def from_names(cls, names: Mapping[str, Any]) -> GenerationRequest:
        """Return the settings for a task's `generation_kwargs`.

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
            request = cls(
                until=(until,) if isinstance(until, str) else tuple(until),
                max_new_tokens=int(length),
                temperature=0.0 if samples is False else float(temperature),
                top_k=int(names["top_k"]) if names.get("top_k") else None,  # 0 usually means no limit
                top_p=None if names.get("top_p") is None else float(names["top_p"]),
                unknown=tuple(sorted(set(names) - _KNOWN)),
            )
            if not all(isinstance(word, str) for word in request.until):
                raise ValueError(f"until must hold strings, got {until}")
            Settings(
                max(request.max_new_tokens, 0),
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
            )
            if request.max_new_tokens < 1:
                raise ValueError(f"the number of new tokens must be at least 1, got {request.max_new_tokens}")
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a task's generation_kwargs cannot be met ({error}): {dict(names)}") from error
        return request

    def cut(self, text: str) -> str:
        """Return the text before the first stop string."""
        for word in self.until:
            text = text.split(word, 1)[0] if word else text
        return text


@dataclass(frozen=True)
class GenerationConfig:
    """Sampler settings that apply to all requests."""

    steps: int = 128
    """Number of denoising steps per block."""
    block_length: int | None = None
    sampler: str = "adaptive"
    seed: int = 0
    batch_size: int = 8


def room(prompt_length: int, wanted: int, *, length: int) -> tuple[int, int]:
    """Return (prompt tokens kept, new tokens) for a sequence; new tokens may take half of it, or all that the prompt
    leaves.

    A long prompt thus loses its first tokens before a request of up to half a sequence is cut short.
    """
    new = min(wanted, max(length - prompt_length, length // 2))
    return min(prompt_length, length - new), new


def continuations(
    model: EvaluatedModel,
    requests: Sequence[tuple[str, GenerationRequest]],
    config: GenerationConfig,
    *,
    start: Sequence[int] = (),
    progress: Callable[[int], None],
    say: Callable[[str], None],
) -> list[str]:
    """Return the model's continuation of each context, in order.

    A continuation is a function of (seed, context, settings, number of equal requests before it in this list), and
    does not depend on the batch.

    Args:
        model: the model to sample from.
        requests: contexts with their generation settings.
        config: settings of the sampler.
        start: tokens before every context (bos), never cut off.
        progress: called with the number of requests that have just been finished.
        say: called with a message for each context or continuation that is cut to fit the sequence.

    Raises:
        ConfigError: models of this training method cannot be sampled.
    """
    sampler = model.sampler()
    plans = _plans(model, sampler, requests, config, tuple(start), say)
    numbers = {plan.settings: number for number, plan in enumerate(plans)}
    found = [""] * len(requests)
    for taken in batches(
        range(len(plans)), lambda i: (len(plans[i].prompt.prompt), numbers[plans[i].settings]), config.batch_size
    ):
        for i, text in zip(taken, _written(model, sampler, [plans[i] for i in taken], config.seed), strict=True):
            found[i] = requests[i][1].cut(text)
        progress(len(taken))
    return found


@dataclass(frozen=True)
class _Plan:
    """A request prepared for the sampler."""

    prompt: Item
    """Tokens of the prompt, with an empty completion."""
    settings: Settings
    occurrence: int
    """Number of equal requests before it."""


def _plans(
    model: EvaluatedModel,
    sampler: Sampler,
    requests: Sequence[tuple[str, GenerationRequest]],
    config: GenerationConfig,
    start: tuple[int, ...],
    say: Callable[[str], None],
) -> list[_Plan]:
    plans, seen = [], Counter()
    length = model.model.seq_length - len(start)
    for context, request in requests:
        ids = model.tokenizer.encode(context)
        kept, new = room(len(ids), request.max_new_tokens, length=length)
        if new < request.max_new_tokens:
            say(f"the model's sequence holds {model.model.seq_length} tokens; continuations end where it ends")
        if kept < len(ids):
            say(f"the model's sequence holds {model.model.seq_length} tokens; long contexts lose their first tokens")
        prompt, settings = Item((*start, *ids[len(ids) - kept :]), ()), _settings(model, sampler, request, new, config)
        plans.append(_Plan(prompt, settings, seen[prompt, settings]))
        seen[prompt, settings] += 1
    return plans


def _written(model: EvaluatedModel, sampler: Sampler, plans: Sequence[_Plan], seed: int) -> list[str]:
    """Return the new text for prompts of one length with the same settings."""
    length = len(plans[0].prompt.prompt)
    ids = torch.tensor([plan.prompt.prompt for plan in plans], dtype=torch.int64).reshape(len(plans), length)
    written = sampler.generate(
        model.denoise,
        ids.to(model.platform.device),
        plans[0].settings,
        seed=[seed_of(seed, plan.prompt) for plan in plans],
        sequences=torch.tensor([plan.occurrence for plan in plans]),
    )
    sequences = zip(written.sequences.tolist(), written.new_tokens.tolist(), strict=True)
    return [_behind(model, sequence[: length + new], length) for sequence, new in sequences]


def _settings(
    model: EvaluatedModel, sampler: Sampler, request: GenerationRequest, new: int, config: GenerationConfig
) -> Settings:
    return sampler.settings(
        new,
        max_denoising_steps=config.steps,
        block_length=config.block_length,
        sampler=config.sampler,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        eos_token_id=model.tokenizer.eos_id,
        pad_token_id=model.tokenizer.pad_id,
    )


def _behind(model: EvaluatedModel, sequence: list[int], prompt_length: int) -> str:
    """Return the text of the new tokens as it follows the prompt's, including the space between them."""
    before, whole = model.tokenizer.decode(sequence[:prompt_length]), model.tokenizer.decode(sequence)
    return whole[len(before) :] if whole.startswith(before) else model.tokenizer.decode(sequence[prompt_length:])
