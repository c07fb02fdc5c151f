"""Chat templates: conversations as text, and the places in it that the assistant wrote.

A template is Transformers' (`chat_template.jinja`, or `chat_template` in `tokenizer_config.json`, or a file of the
user's own), rendered by Transformers. One with `{% generation %}` tags marks the answers itself. In any other, an
answer is found by comparison with the same conversation that has a mark in its place:

- It begins where the prompt ends that the template writes for generation (`add_generation_prompt`). A template that
  ignores this setting writes the header of an answer with the answer; the header is then no part of it.
- It ends with what the template writes right behind the content, such as `<|im_end|>`, without blanks at its end.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from megadiff.data.tokenizers import load_tokenizer
from megadiff.errors import DataError
from megadiff.files import UnreadableFileError, read_json_object, read_text, why

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of messages."""

_MAX_BYTES = 2**24
TEMPLATE_FILE = "chat_template.jinja"
"""Name of the file in which Transformers keeps a chat template."""

_CONFIG = "tokenizer_config.json"
_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = range(0xE000, 0xF8FF)  # characters for private use, of which some do not occur in a conversation

Message = dict[str, Any]


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    answers: list[tuple[int, int]]
    """First character and end of each answer."""


class ChatTemplate:
    """A chat template of Transformers.

    Args:
        source: text of the template.
        names: names of special tokens by the variables that templates know them by, such as `eos_token`.

    Raises:
        DataError: Transformers is missing, or the template is not one.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        try:
            from jinja2 import TemplateSyntaxError
            from transformers.utils.chat_template_utils import render_jinja_template
        except ImportError:
            raise DataError("chat templates need Transformers; pip install 'megadiff[hf]'") from None
        self._source, self._names, self._library = source, dict(names), cast("Any", render_jinja_template)
        self._has_tags = _TAG.search(source) is not None
        try:
            self._rendered([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        except TemplateSyntaxError as error:
            raise DataError(f"the chat template is damaged (line {error.lineno}: {error}); correct it") from error
        except Exception:  # a template may refuse this conversation and take those of the corpus
            return

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Return a conversation as text, with the places of all of its answers.

        Raises:
            DataError: the template refuses it, or an answer is not found in the text.
        """
        text, marked = self._accepted(messages)
        if self._has_tags:
            if not marked:
                raise DataError("the generation tags of the chat template mark no answer in it")
            return Rendered(text, marked)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return Rendered(text, [self._answer(messages, place, text) for place in answers])

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text after which an answer to the last message is generated.

        Raises:
            DataError: the template refuses the messages.
        """
        return self._accepted(messages, prompt=True)[0]

    def _accepted(self, messages: Sequence[Message], *, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        try:
            return self._rendered(messages, prompt=prompt)
        except Exception as error:  # templates raise errors of many kinds
            raise DataError(f"the chat template refuses it ({error})") from error

    def _rendered(self, messages: Sequence[Message], *, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        texts, marked = self._library(
            conversations=[list(messages)],
            chat_template=self._source,
            return_assistant_tokens_mask=self._has_tags,
            add_generation_prompt=prompt,
            **self._names,
        )
        return texts[0], [tuple(span) for span in marked[0]] if self._has_tags else []

    def _answer(self, messages: Sequence[Message], place: int, text: str) -> tuple[int, int]:
        """Return the first character and the end of an answer by the rule of the module."""
        mark = next(chr(code) for code in _MARKS if chr(code) not in text) * 3
        answer = {**messages[place], "content": mark}
        try:
            marked, _ = self._rendered([*messages[:place], answer, *messages[place + 1 :]])
        except Exception as error:  # of a template that looks for something in the content
            raise DataError(
                f"the chat template refuses another content of message {place + 1} ({error}), so its place is not "
                "known; mark answers in the template with generation tags"
            ) from error
        if marked.count(mark) != 1:
            raise DataError(
                f"the chat template writes the content of message {place + 1} {marked.count(mark)} times in place of "
                "once, so its place is not known; mark answers in the template with generation tags"
            )
        before, _, after = marked.partition(mark)
        start = _shared(text, before)
        end = max(start, len(text) - _shared(text[::-1], after[::-1]))
        opening, closing = self._around(messages[:place], answer, mark)
        if text[:start].endswith(opening):
            start -= len(opening)
        if text[end:].startswith(closing):
            end += len(closing)
        return start, end

    def _around(self, earlier: Sequence[Message], answer: Message, mark: str) -> tuple[str, str]:
        """Return what the template writes with an answer: between the prompt for generation and it, and behind it."""
        try:
            head, _, tail = self._rendered([*earlier, answer])[0].partition(mark)
            prompt, plain = (self._rendered(earlier, prompt=is_prompt)[0] for is_prompt in (True, False))
        except Exception:  # a conversation that ends here may be one that the template refuses
            return "", ""
        opening = head[len(prompt) :] if head.startswith(prompt) else ""
        is_header = prompt == plain and bool(opening.strip())
        return "" if is_header else opening, tail.rstrip()


def _shared(one: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def find_template(tokenizer_path: str | Path, given: str | Path | None, *, instead: str) -> str:
    """Return the chat template of a tokenizer, or that of the file that is given in its place.

    Args:
        tokenizer_path: the tokenizer, beside whose files its template lies.
        given: file of a template, which is taken instead.
        instead: what a command takes that needs no template; the refusal names it.

    Raises:
        DataError: there is no template or no tokenizer, or a file cannot be read.
    """
    if given is not None:
        return _read(Path(given))
    folder = _folder(tokenizer_path)
    if (folder / TEMPLATE_FILE).is_file():
        return _read(folder / TEMPLATE_FILE)
    found = _config(folder).get("chat_template")
    if isinstance(found, list):  # several templates by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        load_tokenizer(tokenizer_path)  # where there is no tokenizer at all, this says so
        raise DataError(
            f"{tokenizer_path}: wanted a tokenizer with a chat template ({TEMPLATE_FILE}, or chat_template in "
            f"{_CONFIG}), found none; give one with --chat-template FILE, or {instead}"
        )
    return found


def template_sha256(template: str) -> str:
    """Return the SHA-256 (hex) of a chat template's text, by which data and models name it."""
    return hashlib.sha256(template.encode()).hexdigest()


def special_names(tokenizer_path: str | Path) -> dict[str, str]:
    """Return the special tokens that `tokenizer_config.json` names, such as `eos_token` -> `</s>`."""
    found = {}
    for key, value in _config(_folder(tokenizer_path)).items():
        name = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(name, str):
            found[key] = name
    return found


def _folder(tokenizer_path: str | Path) -> Path:
    path = Path(tokenizer_path)  # which may be a name, such as `byte`, with nothing beside it
    return path.parent if path.is_file() else path


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    try:
        return read_json_object(path, max_bytes=_MAX_BYTES)
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path} {why(error)}; correct or remove it") from error


def _read(path: Path) -> str:
    try:
        return read_text(path, max_bytes=_MAX_BYTES)
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path}: the chat template {why(error)}; correct the path or the file") from error
