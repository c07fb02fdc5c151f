"""Conversations of a corpus as tokens, of which the model is to predict the answers.

A record of the corpus is chat messages, or a prompt and its completion. It travels through the corpus reader as one
JSON text, so that filters, splits and duplicates treat it like any other document, and becomes tokens here. Indexed
data hold a conversation as one document of several sequences: what is given and an answer in turn
(`IndexedManifest.spans`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megadiff.config.nodes import COMMAND_LINE
from megadiff.config.section import Section
from megadiff.data.chat_template import ROLES, ChatTemplate, Message, find_template, special_names, template_sha256
from megadiff.data.corpus_files import TextFields, json_kind
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import SHOWN_DIGITS, ConfigError, DataError, shown

TURNS: tuple[Literal["together"], Literal["apart"]] = ("together", "apart")
"""Ways to take a conversation of several answers; the first is the default."""

_OTHER_KEYS = {"from": "role", "value": "content"}


class ConversationOptions(Section, use_attribute_docstrings=False):
    """The options that decide which tokens a record becomes, and which of them are predicted."""

    chat_key: str | None = None
    """Key of the messages; None for prompts and completions."""

    prompt_key: str | None = None
    """Key of the prompts."""

    completion_key: str | None = None
    """Key of their completions."""

    template: str | None = None
    """Text of the chat template; None for prompts and completions."""

    names: tuple[tuple[str, str], ...] = ()
    """Special tokens by the variables that the template knows them by, such as `eos_token`."""

    turns: Literal["together", "apart"] = TURNS[0]
    """`together`: a conversation with all of its answers predicted; `apart`: one for each answer, without the messages
    that follow it."""

    def __hash__(self) -> int:
        """Return a hash of all of them, by which the encoder of a process is kept."""
        return hash((self.chat_key, self.prompt_key, self.completion_key, self.template, self.names, self.turns))

    def __str__(self) -> str:
        """Return the options as messages name them."""
        if self.template is None:
            return f"--prompt-key {self.prompt_key} --completion-key {self.completion_key}"
        digest = hashlib.sha256(repr((self.template, self.names)).encode()).hexdigest()[:SHOWN_DIGITS]
        return f"--chat-key {self.chat_key} --turns {self.turns} with the chat template {digest}"

    @property
    def template_sha256(self) -> str | None:
        """SHA-256 (hex) of the chat template; None without one."""
        return None if self.template is None else template_sha256(self.template)

    @property
    def fields(self) -> ConversationFields:
        """Fields of a record that hold its conversation."""
        if self.chat_key is not None:
            return ConversationFields((self.chat_key,))
        return ConversationFields((str(self.prompt_key), str(self.completion_key)))


@dataclass(frozen=True)
class ConversationFields(TextFields):
    """The fields of messages, or of a prompt and its completion, whose text is their JSON."""

    @property
    def option(self) -> str:
        """Option of the command line that names the fields."""
        return "--chat-key" if self._is_chat else "--prompt-key and --completion-key"

    @property
    def are_nested(self) -> bool:
        """Whether fields may be arrays or objects."""
        return self._is_chat

    @property
    def _is_chat(self) -> bool:
        return len(self.names) == 1

    def fault_of(self, name: str, value: Any) -> str | None:
        """Return why the value of a field cannot be used; None if it can."""
        if not self._is_chat:
            return super().fault_of(name, value)
        found = _parsed(value)
        return None if isinstance(found, list) else f"`{name}` must be a list of messages, found {json_kind(found)}"

    def text(self, values: Sequence[Any]) -> str:
        """Return the record as JSON."""
        record = [_parsed(values[0])] if self._is_chat else list(values)
        return json.dumps(record, ensure_ascii=False)


def _parsed(value: Any) -> Any:
    """Return messages that a column of text holds as JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


class Conversation(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    predicted: list[bool]
    """Whether each token belongs to an answer."""
    num_bytes: int
    """Number of bytes of its text in UTF-8."""

    def spans(self) -> list[list[int]]:
        """Return the tokens in turn: those before the first answer, which may be none, the answer, and so on."""
        pairs = zip(self.predicted, self.ids, strict=True)
        runs = [(is_answer, [token for _, token in run]) for is_answer, run in groupby(pairs, key=lambda pair: pair[0])]
        return [*([[]] if runs[0][0] else []), *(tokens for _, tokens in runs)]


class ConversationEncoder:
    """Records to tokens.

    Args:
        tokenizer: the tokenizer.
        options: what records hold, and how they are taken.
        prepend_bos, append_eod: whether bos begins and eos ends each conversation, if they do not already.

    Raises:
        DataError: messages are wanted, and there is no chat template, or the tokenizer has no `tokenizer.json` form.
    """

    def __init__(
        self, tokenizer: Tokenizer, options: ConversationOptions, *, prepend_bos: bool, append_eod: bool
    ) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._bos = tokenizer.bos_id if prepend_bos else None
        self._eos = tokenizer.eos_id if append_eod else None
        self._chat = None if options.chat_key is None else _Chat(tokenizer, options)

    def encode(self, record: str) -> Iterator[Conversation]:
        """Yield the conversations of a record (`ConversationFields.text`).

        Raises:
            DataError: the record is no conversation with an answer, or its template refuses it.
        """
        values = json.loads(record)
        if self._chat is None:
            found = iter([_pair(values[0], values[1], self._tokenizer)])
        else:
            found = self._chat.encode(checked(values[0]), is_apart=self._options.turns == TURNS[1])
        for conversation in found:
            ids, predicted, num_bytes = conversation
            if self._bos is not None and ids[0] != self._bos:
                ids, predicted = [self._bos, *ids], [False, *predicted]
            if self._eos is not None and ids[-1] != self._eos:
                ids, predicted = [*ids, self._eos], [*predicted, True]
            yield Conversation(ids, predicted, num_bytes)


def chat_prompt(tokenizer: Tokenizer, options: ConversationOptions, message: str) -> list[int]:
    """Return the tokens after which an answer to a user's message is generated, as in training.

    Raises:
        DataError: as for `ConversationEncoder`, or the template refuses the message.
    """
    return _Chat(tokenizer, options).prompt([{"role": "user", "content": message}])


@lru_cache(maxsize=1)
def encoder_of(
    tokenizer: Tokenizer, options: ConversationOptions, *, prepend_bos: bool, append_eod: bool
) -> ConversationEncoder:
    """Return the encoder of a process, which compiles the template once."""
    return ConversationEncoder(tokenizer, options, prepend_bos=prepend_bos, append_eod=append_eod)


def checked(messages: Any) -> list[Message]:
    """Return messages as a list of roles and contents that ends with an answer.

    Raises:
        DataError: they are something else.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError("it has no messages")
    found = [_message(number, message) for number, message in enumerate(messages, start=1)]
    if all(message["role"] != "assistant" for message in found):
        raise DataError("it has no message of the role assistant, so nothing could be predicted")
    if found[-1]["role"] != "assistant":
        raise DataError(f"its last message is of the role {found[-1]['role']}, wanted an answer of the role assistant")
    return found


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"message {number} must be an object with role and content, found {json_kind(message)}")
    for key in ("role", "content"):
        if key not in message:
            other = next(
                (f"; rename `{old}` to it" for old, new in _OTHER_KEYS.items() if new == key and old in message), ""
            )
            raise DataError(f"message {number} has no `{key}`{other}")
    if message["role"] not in ROLES:
        raise DataError(
            f"message {number} has the role {shown(str(message['role']))}, wanted one of {', '.join(ROLES)}"
        )
    if not isinstance(message["content"], str):
        kind = json_kind(message["content"])
        raise DataError(f"the content of message {number} must be a string, found {kind}")
    return {key: value for key, value in message.items() if value is not None}


def split_completion(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens of a prompt and of its completion.

    Both are encoded as one text and split after the prompt's own tokens, so that the completion is tokenized as in
    running text; if there is no token boundary there, they are encoded separately.
    """
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
    after = whole[len(before) :]
    if whole[: len(before)] != before or not after:
        after = tokenizer.encode(completion)
    return before, after


def _pair(prompt: str, completion: str, tokenizer: Tokenizer) -> Conversation:
    before, after = split_completion(prompt, completion, tokenizer)
    if not after:
        raise DataError("its completion is empty, so nothing could be predicted")
    predicted = [False] * len(before) + [True] * len(after)
    return Conversation([*before, *after], predicted, len((prompt + completion).encode()))


class _Chat:
    """Messages to tokens by a chat template."""

    def __init__(self, tokenizer: Tokenizer, options: ConversationOptions) -> None:
        opened = getattr(tokenizer, "with_special_names", None)
        inner = opened() if opened is not None else None
        if inner is None:
            raise DataError(
                f"the tokenizer {tokenizer.name} has no tokenizer.json form, which chat templates need; use "
                "another one, or prompts and completions with --prompt-key"
            )
        own = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        named = {key: name for key, token in own.items() if token is not None and (name := inner.id_to_token(token))}
        self._inner = inner
        self._template = ChatTemplate(str(options.template), {**named, **dict(options.names)})
        added = [token.content for token in inner.get_added_tokens_decoder().values() if token.special]
        longest_first = sorted(added, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, messages: list[Message], *, is_apart: bool) -> Iterator[Conversation]:
        """Yield the conversation with all of its answers, or one for each answer."""
        self._refuse_special(messages)
        if not is_apart:
            yield self._encoded(messages, is_apart=False)
            return
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                yield self._encoded(messages[: place + 1], is_apart=True)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Return the tokens after which an answer is generated."""
        self._refuse_special(messages)
        return self._inner.encode(self._template.prompt(messages), add_special_tokens=False).ids

    def _refuse_special(self, messages: list[Message]) -> None:
        for number, message in enumerate(messages, start=1):
            if (found := self._special.search(message["content"])) is not None:
                raise DataError(
                    f"message {number} spells the special token {shown(found.group())}, which would begin or end a turn"
                )

    def _encoded(self, messages: Sequence[Message], *, is_apart: bool) -> Conversation:
        text, answers = self._template.render(messages)
        encoding = self._inner.encode(text, add_special_tokens=False)
        starts = [start for start, _ in answers[-1 if is_apart else 0 :]]
        ends = [end for _, end in answers[-1 if is_apart else 0 :]]
        predicted = [_is_inside(start, end, starts, ends) for start, end in encoding.offsets]
        if True not in predicted:
            raise DataError("its answers have no tokens")
        # What a template writes behind the last answer is left out: clean tokens there would show where it ends.
        length = len(predicted) - predicted[::-1].index(True)
        return Conversation(encoding.ids[:length], predicted[:length], len(text.encode()))


def _is_inside(start: int, end: int, starts: Sequence[int], ends: Sequence[int]) -> bool:
    """Return whether a token of these characters shares one with an answer, as in Transformers."""
    return any(start < last and max(end, start + 1) > first for first, last in zip(starts, ends, strict=True))


def add_conversation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `conversations_from`."""
    group = parser.add_argument_group("conversations, of which a model learns to predict the answers")
    group.add_argument("--chat-key", metavar="KEY", help="key or column with chat messages (lists of role and content)")
    group.add_argument("--prompt-key", metavar="KEY", help="key or column with prompts, beside --completion-key")
    group.add_argument("--completion-key", metavar="KEY", help="key or column with the completions of the prompts")
    group.add_argument(
        "--chat-template", metavar="FILE", help="Transformers chat template in the place of the tokenizer's own"
    )
    group.add_argument(
        "--turns",
        choices=TURNS,
        default=TURNS[0],
        help="several answers of a conversation: predicted together (default), or one conversation for each of them, "
        "which ends with it",
    )


def conversations_from(arguments: argparse.Namespace) -> ConversationOptions | None:
    """Return the options that the command line gives; None for plain documents.

    Raises:
        ConfigError: options do not go together.
        DataError: the template cannot be read.
    """
    chat, pair = arguments.chat_key, (arguments.prompt_key, arguments.completion_key)
    given = [name for name in ("chat_template", "turns") if getattr(arguments, name) not in (None, TURNS[0])]
    if chat is None and pair == (None, None):
        if given:
            raise ConfigError(f"{COMMAND_LINE}: {_option(given[0])} has no meaning without --chat-key; give that too")
        return None
    if chat is not None and pair != (None, None):
        raise ConfigError(f"{COMMAND_LINE}: --chat-key has no meaning beside prompts and completions; give one of them")
    if chat is None and None in pair:
        missing = "--prompt-key" if pair[0] is None else "--completion-key"
        raise ConfigError(f"{COMMAND_LINE}: {missing} is missing; give both --prompt-key and --completion-key")
    if chat is None and given:
        raise ConfigError(f"{COMMAND_LINE}: {_option(given[0])} has no meaning beside --prompt-key; drop it")
    if arguments.template is not None or arguments.backend == "gigatoken":
        other = "--template" if arguments.template is not None else "--backend gigatoken"
        raise ConfigError(f"{COMMAND_LINE}: {other} has no meaning for conversations; drop it")
    if chat is None:
        return ConversationOptions(prompt_key=pair[0], completion_key=pair[1])
    return chat_options(arguments.tokenizer, chat, template=arguments.chat_template, turns=arguments.turns)


def chat_options(
    tokenizer_path: str | Path,
    key: str,
    *,
    template: str | Path | None = None,
    turns: Literal["together", "apart"] = TURNS[0],
    instead: str = "prompts and completions with --prompt-key",
) -> ConversationOptions:
    """Return the options for chat messages.

    Args:
        tokenizer_path: the tokenizer, beside whose files its chat template lies.
        key: key or column of the messages.
        template: file of a template in the place of the tokenizer's.
        turns: one of `TURNS`.
        instead: what the command takes that needs no template; a refusal names it.

    Raises:
        DataError: there is no template, or a file cannot be read.
    """
    names = tuple(special_names(tokenizer_path).items())
    found = find_template(tokenizer_path, template, instead=instead)
    return ConversationOptions(chat_key=key, template=found, names=names, turns=turns)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
