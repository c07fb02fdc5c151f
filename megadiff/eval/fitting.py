"""Fitting of texts longer than a model's sequence, so that every completion token is still scored exactly once."""

from __future__ import annotations

from collections.abc import Sequence

from megadiff.eval.likelihood import Item
from megadiff.eval.rolling import rolling_items


def split_to_fit(item: Item, *, length: int, start: Sequence[int] = ()) -> list[Item]:
    """Return the item in pieces that fit into a sequence, each a factor of its likelihood; one piece if possible.

    A prompt that is too long loses its first tokens. A completion that fills a sequence by itself is scored window
    after
    window: the first after the last half sequence of the prompt, each later one after the half sequence before it.

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
