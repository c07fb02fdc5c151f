"""Record of a denoising: the tokens at every step, what happened to them, and the model's confidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache

from torch import Tensor

from megadiff.data.tokenizers import Tokenizer
from megadiff.sampling.standalone import Step


class Fate(IntEnum):
    """State of a position, and the effect of the last step on it."""

    GIVEN = 0
    """A token of the prompt."""
    KEPT = 1
    """A token that was there before this step."""
    REVISED = 2
    """A token written in this step, in place of a mask or of another token."""
    NOISY = 3
    """A mask, noise of a later block, or a token of the initial noise that no step has overwritten."""


@dataclass(frozen=True)
class Frame:
    """State of a sequence between two steps."""

    steps_left: int
    block: int
    log_snr: float
    ids: list[int]
    fates: list[Fate]
    confidence: list[float | None]
    """Probability in [0, 1] that the model gives to each token of the window; None elsewhere."""


@dataclass
class Trace:
    """Observer (`generate(on_step=...)`) that records one sequence's frames.

    Args:
        given: the prompt, [P] ids, -1 for a position to fill in.
        mask_id: id of the mask.
        sequence: index of the sequence in the batch.
        on_frame: called with each frame when it is made.
    """

    given: list[int]
    mask_id: int
    sequence: int = 0
    on_frame: Callable[[Frame], None] | None = None
    frames: list[Frame] = field(default_factory=list)
    _blocks: list[int] = field(default_factory=list)

    def __call__(self, step: Step) -> None:
        """Record this step's frame."""
        if step.start not in self._blocks:
            self._blocks.append(step.start)
        ids = step.ids[self.sequence].tolist()
        sure: list[float | None] = [None] * len(ids)
        sure[step.start : step.stop] = [float(value) for value in _sequence(step.confidence(), self.sequence)]
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
            return Fate.NOISY  # initial uniform noise
        before = self.frames[-1]
        if ids[place] != before.ids[place]:
            return Fate.REVISED
        # Noise remains noise until a step overwrites it, up to the last frame.
        return Fate.NOISY if before.fates[place] == Fate.NOISY else Fate.KEPT


def token_text(tokenizer: Tokenizer) -> Callable[[int], str]:
    """Return a function from an id to its text amid others: with the space before it, or its name if it has no text."""
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
    """Return sampled text with control characters replaced, so that none reaches a terminal or a viewer."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _sequence(values: Tensor, sequence: int) -> list[float]:
    return values[sequence].tolist()
