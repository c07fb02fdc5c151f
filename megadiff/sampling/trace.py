"""The record of a denoising: what stood where at every step, what became of it, and how sure the model was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache

from torch import Tensor

from megadiff.data.tokenizers import Tokenizer
from megadiff.sampling.standalone import Step


class Fate(IntEnum):
    """What a position holds, and what the last step did to it."""

    GIVEN = 0
    """Part of the prompt."""
    KEPT = 1
    """A token that was there before this step."""
    REVISED = 2
    """A token this step wrote: in a mask's place, or over another token."""
    NOISY = 3
    """A mask, noise of a block still to come, or a token of the first noise that no step has written over."""


@dataclass(frozen=True)
class Frame:
    """A row between two steps."""

    steps_left: int
    block: int
    log_snr: float
    ids: list[int]
    fates: list[Fate]
    confidence: list[float | None]
    """The model's probability of each token it was asked about, in [0, 1]."""


@dataclass
class Trace:
    """An observer (`generate(on_step=...)`) that keeps one row's frames.

    Args:
        given: what stands in the prompt: [P] ids, -1 for a position to fill in.
        mask_id: the mask.
        row: which row of the batch.
        on_frame: told of each frame as it is made.
    """

    given: list[int]
    mask_id: int
    row: int = 0
    on_frame: Callable[[Frame], None] | None = None
    frames: list[Frame] = field(default_factory=list)
    _blocks: list[int] = field(default_factory=list)

    def __call__(self, step: Step) -> None:
        """Keep this step's frame."""
        if step.start not in self._blocks:
            self._blocks.append(step.start)
        ids = step.ids[self.row].tolist()
        sure: list[float | None] = [None] * len(ids)
        sure[step.start : step.stop] = [float(value) for value in _row(step.confidence(), self.row)]
        frame = Frame(
            step.steps_left,
            len(self._blocks),
            step.log_snr,
            ids,
            [self._fate(i, ids, step) for i in range(len(ids))],
            sure,
        )
        self.frames.append(frame)
        if self.on_frame is not None:
            self.on_frame(frame)

    def _fate(self, place: int, ids: list[int], step: Step) -> Fate:
        if place < len(self.given) and self.given[place] >= 0:
            return Fate.GIVEN
        if ids[place] == self.mask_id or place >= step.stop:
            return Fate.NOISY
        if not self.frames:
            return Fate.NOISY  # uniform noise to start from
        before = self.frames[-1]
        if ids[place] != before.ids[place]:
            return Fate.REVISED
        # Noise stays noise until a step writes the place, to the last frame.
        return Fate.NOISY if before.fates[place] == Fate.NOISY else Fate.KEPT


def token_text(tokenizer: Tokenizer) -> Callable[[int], str]:
    """What one id looks like amid others: its text with the space before it, or its name where it has no text."""
    special = {tokenizer.bos_id: "bos", tokenizer.eos_id: "eos", tokenizer.pad_id: "pad"}
    names = {i: f"\u27e8{name}\u27e9" for i, name in special.items() if i is not None} | {tokenizer.mask_id: "\u2591"}

    @cache
    def text(token: int) -> str:
        if token in names:
            return names[token]
        alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone

    return text


def printable(text: str) -> str:
    """Drawn text in which a control character cannot reach a terminal or a viewer."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _row(values: Tensor, row: int) -> list[float]:
    return values[row].tolist()
