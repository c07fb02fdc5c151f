"""Texts to evaluate: strings read from lines of JSON, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadiff.data.json_text import NotJson, parse_json_line, without_lone_surrogates
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import DataError
from megadiff.eval.likelihood import Item

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_lines(path: Path, keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the strings under `keys` of every line of a .jsonl file; empty lines are skipped.

    Raises:
        DataError: there is no such file, it is empty, or a line is not an object with strings under these keys.
    """
    if not path.is_file():
        raise DataError(f"{path}: wanted a .jsonl file, found {'a folder' if path.is_dir() else 'nothing'}")
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

    Both are encoded as one text and split after the prompt's own tokens, so that the completion is tokenized as in
    running text; if there is no token boundary there, they are encoded separately.

    Args:
        prompt: text before the completion.
        completion: text to score.
        tokenizer: the model's tokenizer.
        start: tokens before the prompt (bos), given and not scored.
        end: tokens after the completion (eos), scored.
    """
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
    after = whole[len(before) :]
    if whole[: len(before)] != before or not after:
        after = tokenizer.encode(completion)
    return Item((*start, *before), (*after, *end))


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    value = parse_json_line(line)
    if isinstance(value, NotJson):
        raise DataError(f"{where}: wanted a JSON object, found text that is none ({value.why})")
    if not isinstance(value, dict):
        raise DataError(f"{where}: wanted a JSON object, found a {type(value).__name__}")
    return value


def _strings(value: dict[str, Any], keys: Sequence[str], where: str) -> tuple[str, ...]:
    for key in keys:
        if not isinstance(value.get(key), str):
            found = "nothing" if key not in value else f"a {type(value[key]).__name__}"
            raise DataError(f"{where}: wanted a string under {key!r}, found {found}; the keys here are {sorted(value)}")
    return tuple(without_lone_surrogates(value[key]) for key in keys)
