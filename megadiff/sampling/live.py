"""Live display of a denoising in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from megadiff.sampling.trace import Fate, Frame

_STYLES = {Fate.GIVEN: "dim", Fate.KEPT: "green", Fate.REVISED: "bold yellow", Fate.NOISY: "bright_black"}


class LiveDenoising:
    """A live picture of one sequence, updated with every frame; a context manager, and an observer of a `Trace`.

    Args:
        token_text: returns the text of an id; control characters never reach the terminal.
        mask_id: id of the mask, shown as a block character.
        console: the console to draw on; nothing is drawn if it is not a terminal.
    """

    def __init__(self, token_text: Callable[[int], str], *, mask_id: int, console: Console | None = None) -> None:
        self._text, self._mask_id = token_text, mask_id
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=12, transient=True)

    def __enter__(self) -> LiveDenoising:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    @property
    def is_drawn(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self._console.is_terminal

    def __call__(self, frame: Frame) -> None:
        """Draw this frame."""
        if self.is_drawn:
            self._live.update(self.picture(frame))

    def picture(self, frame: Frame) -> Group:
        """Return the frame as a rich object."""
        text = Text(overflow="fold")
        for token, fate in zip(frame.ids, frame.fates, strict=True):
            shown = "\u2591" if token == self._mask_id else _for_a_terminal(self._text(token))
            text.append(shown, style=_STYLES[fate])
        return Group(Rule(f"block {frame.block}, {frame.steps_left} steps left", style="dim"), text)


def _for_a_terminal(text: str) -> str:
    """Replace control characters, which must not reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
