"""Interface to lm-evaluation-harness: importing this module registers a trained model there as `megadiff`.

    with open_model("runs/demo") as model:
        lm_eval.simple_evaluate(model=HarnessModel(model), tasks=["arc_easy"])

Every result is a function of (seed, the request), and does not depend on the batch, the order, or other tasks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from megadiff.errors import ConfigError
from megadiff.eval.likelihood import (
    BoundSettings,
    Estimator,
    EvaluatedModel,
    Item,
    Likelihood,
    batches,
    greedy,
    seed_of,
    summed,
)
from megadiff.eval.texts_likelihood import SpecialTokens, is_cut, item_of, rolling_items, split_to_fit
from megadiff.sampling.sampler import Sampler
from megadiff.sampling.standalone import Settings

log = logging.getLogger("megadiff")

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


@dataclass(frozen=True)
class HarnessSettings:
    """Settings of the evaluation."""

    bound: BoundSettings = field(default_factory=BoundSettings)
    """Estimator of a diffusion model's likelihoods; its `batch_size` applies to autoregressive models too."""
    config: GenerationConfig = field(default_factory=GenerationConfig)
    """Sampler settings of continuations."""
    context: int = 0
    """Maximal number of tokens given before each window of a rolling likelihood."""
    prepend_bos: bool | None = None
    """Whether bos comes before each prompt, context or document; None follows the training data. An autoregressive
    model's sequences start with it in any case.
    """
    check_greedy: bool = True
    """Whether to determine which completions are greedy; otherwise none is reported as greedy."""


@dataclass(frozen=True)
class Answer:
    """A likelihood returned to the harness, with further facts that the harness does not use."""

    task: str | None
    doc: int | None
    choice: int
    """Number of the request within its document."""
    kind: str
    """Kind of the request: loglikelihood or loglikelihood_rolling."""
    log_likelihood: float
    """Log-likelihood in nats; a lower bound for a diffusion model."""
    stderr: float
    """Standard error of the estimate of the bound; 0 if it is exact."""
    tokens: int
    is_greedy: bool | None
    """Whether the completion is greedy; None if this was not determined."""


@dataclass(frozen=True)
class Continued:
    """A continuation returned to the harness."""

    task: str | None
    doc: int | None
    text: str


class HarnessModel(LM):
    """A trained model that serves the harness's three kinds of request.

    Likelihoods of a diffusion model are lower bounds (prompt clean, completion noised), so choices are compared by
    their bounds; those of an autoregressive model are exact. No end token is scored.

    Args:
        model: an opened model (`export.opened.open_model`).
        settings: settings of the evaluation.
        batch_size: sequences per forward pass, overriding the settings; the harness passes its option by this name.
        say: called once with each message about something that is cut or left out.

    Raises:
        ConfigError: a path is given instead of an opened model, or bos is requested but the tokenizer has none.
    """

    def __init__(
        self,
        model: EvaluatedModel,
        settings: HarnessSettings | None = None,
        *,
        batch_size: int | str | None = None,
        say: Callable[[str], None] = log.warning,
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            raise ConfigError(
                f"wanted an opened model, found the path {model!r}; open it with megadiff.export.opened.open_model, or "
                "run `megadiff harness`"
            )
        self._model, self._settings = model, settings or HarnessSettings()
        if batch_size is not None:
            self._settings = _batched(self._settings, int(batch_size))
        framing = SpecialTokens.like_the_data(model, prepend_bos=self._settings.prepend_bos)
        has_bos = framing.prepend_bos and not model.adds_start_token
        self._start, _ = SpecialTokens(prepend_bos=has_bos).ids(model.tokenizer)
        self._speak, self._said = say, set[str]()
        self.answers: list[Answer] = []
        """Likelihoods returned so far, in the order of the requests."""
        self.continued: list[Continued] = []
        """Continuations returned so far."""
        self._likelihoods: dict[Item, Likelihood] = {}
        self._pieces: list[Sequence[Item]] = []  # pieces of each answer, in the same order

    @cached_property
    def _estimator(self) -> Estimator:
        return self._model.estimator(self._settings.bound)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, is_greedy) of the continuation of each request's context.

        A context too long for a sequence loses its first tokens. For a diffusion model, `is_greedy` is whether the
        adaptive sampler generates exactly this continuation at temperature 0, one token per step, for as many positions
        as it has tokens (`greedy`); False for all if the settings disable it.
        """
        items = [self._item(*request.args) for request in requests]
        length = self._model.model.seq_length
        if any(is_cut(item, length=length, start=self._start) for item in items):
            self._say(
                f"the model's sequence holds {length} tokens; long contexts lose their first ones, and completions "
                "that fill a sequence are scored in pieces"
            )
        pieces = [split_to_fit(item, length=length, start=self._start) for item in items]
        found = self._measured(pieces, "loglikelihood", disable_tqdm)
        agrees = self._greedy(pieces, disable_tqdm)
        self._remember(requests, "loglikelihood", pieces, agrees)
        return [(-one.nll, bool(same)) for one, same in zip(found, agrees, strict=True)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods in nats of whole texts, window by window: every token is scored once."""
        try:
            pieces = [
                rolling_items(
                    self._model.tokenizer.encode(request.args[0]),
                    length=self._model.model.seq_length,
                    context=self._settings.context,
                    start=self._start,
                )
                for request in requests
            ]
        except ValueError as error:
            raise ConfigError(str(error)) from error
        found = self._measured(pieces, "loglikelihood_rolling", disable_tqdm)
        self._remember(requests, "loglikelihood_rolling", pieces, [None] * len(found))
        return [-one.nll for one in found]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the model's continuation of each context, up to the first stop string of the request (see
        `GenerationRequest`).

        Raises:
            ConfigError: the model cannot be sampled, or a request has invalid settings.
        """
        asked = [(request.args[0], GenerationRequest.from_names(request.args[1])) for request in requests]
        for name in sorted({name for _, wanted in asked for name in wanted.unknown}):
            self._say(f"generation_kwargs: {name} is not supported by this model and is ignored")
        with _bar(len(requests), "generate_until", disable_tqdm) as progress:
            texts = continuations(
                self._model, asked, self._settings.config, start=self._start, progress=progress, say=self._say
            )
        answered = zip(requests, texts, strict=True)
        self.continued += [Continued(request.task_name, request.doc_id, text) for request, text in answered]
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """Return the facts that the harness writes about a model beside its scores."""
        settings = {**asdict(self._settings), "prepend_bos": bool(self._start)}
        return {"likelihood": self._estimator.coverage, "seq_length": self._model.model.seq_length, **settings}

    def estimates(self) -> dict[str, dict[str, float]]:
        """Return for each task the sum of its log-likelihoods with the standard error of the estimate.

        Requests that have pieces in common share those pieces' errors (`likelihood.summed`).
        """
        found: dict[str, dict[str, float]] = {}
        for task in dict.fromkeys(answer.task for answer in self.answers):
            own = [pieces for answer, pieces in zip(self.answers, self._pieces, strict=True) if answer.task == task]
            total = summed(chain.from_iterable(own), self._likelihoods)
            found[str(task)] = {
                "requests": len(own),
                "tokens": total.tokens,
                "log_likelihood": -total.nll,
                "log_likelihood_stderr": total.stderr,
            }
        return found

    def _item(self, context: str, continuation: str) -> Item:
        """Tokenize a request; white space between the two belongs to the continuation, as in the harness's models."""
        before = context.rstrip()
        return item_of(before, context[len(before) :] + continuation, self._model.tokenizer)

    def _measured(self, pieces: Sequence[Sequence[Item]], kind: str, is_silent: bool) -> list[Likelihood]:
        """Return each request's likelihood; equal pieces are evaluated once."""
        new = dict.fromkeys(item for own in pieces for item in own if item not in self._likelihoods)
        items = sorted(new, key=lambda item: len(item.ids))
        count = 8 * self._settings.bound.batch_size  # items between two updates of the progress bar
        with _bar(len(items), kind, is_silent) as progress:
            for first in range(0, len(items), count):
                taken = items[first : first + count]
                found = self._estimator.likelihoods(self._model, taken)
                self._likelihoods.update(zip(taken, found, strict=True))
                progress(len(taken))
        return [summed(own, self._likelihoods) for own in pieces]

    def _greedy(self, pieces: Sequence[Sequence[Item]], is_silent: bool) -> list[bool | None]:
        if not self._settings.check_greedy:
            self._say("greedy completions are not determined, as configured: leave out tasks that count them")
            return [None] * len(pieces)
        items = list(dict.fromkeys(item for own in pieces for item in own))
        with _bar(len(items), "greedy", is_silent) as progress:
            same = greedy(self._model, self._estimator, items, progress=progress)
        agrees = dict(zip(items, same, strict=True))
        return [all(agrees[item] for item in own) for own in pieces]

    def _remember(
        self, requests: Sequence[Any], kind: str, pieces: Sequence[Sequence[Item]], agrees: Sequence[bool | None]
    ) -> None:
        for request, own, same in zip(requests, pieces, agrees, strict=True):
            one = summed(own, self._likelihoods)
            self.answers.append(
                Answer(request.task_name, request.doc_id, request.idx, kind, -one.nll, one.stderr, one.tokens, same)
            )
            self._pieces.append(own)

    def _say(self, sentence: str) -> None:
        """Report each sentence once."""
        if sentence not in self._said:
            self._said.add(sentence)
            self._speak(sentence)


def _batched(settings: HarnessSettings, sequences: int) -> HarnessSettings:
    if sequences < 1:
        raise ConfigError(f"batch_size must be at least 1, got {sequences}")
    return replace(
        settings,
        bound=replace(settings.bound, batch_size=sequences),
        config=replace(settings.config, batch_size=sequences),
    )


@contextmanager
def _bar(total: int, what: str, is_silent: bool) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar if there is a terminal, and yield the function that advances it."""
    with tqdm(total=total, desc=what, disable=True if is_silent else None) as bar:
        yield bar.update


register_model("megadiff")(HarnessModel)  # not as a decorator, whose type would hide the class's own
