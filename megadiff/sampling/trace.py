"""The steps of a denoising as frames, live in a terminal or on a page.

The page contains no address of another machine and may load none: its policy allows only this page's own style and
script, by their hashes. Tokens are embedded as JSON that cannot contain markup, and are inserted as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.text import Text
from torch import Tensor

from megadiff.data.tokenizers import MASK
from megadiff.sampling.standalone import Step

_KEY = (("given", "prompt"), ("kept", "kept"), ("revised", "written in this step"), ("noisy", "noise, not written"))


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


def printable(text: str) -> str:
    """Return sampled text with control characters replaced, so that none reaches a terminal or a viewer."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _sequence(values: Tensor, sequence: int) -> list[float]:
    return values[sequence].tolist()


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
            shown = MASK if token == self._mask_id else _for_a_terminal(self._text(token))
            text.append(shown, style=_STYLES[fate])
        return Group(Rule(f"block {frame.block}, {frame.steps_left} steps left", style="dim"), text)


def _for_a_terminal(text: str) -> str:
    """Replace control characters, which must not reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


_STYLE = """
:root { color-scheme: light dark; --given: #6b7280; --kept: #1a7f4b; --revised: #b45309; --noisy: #9ca3af; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; }
#about { color: #6b7280; margin: 0 0 1rem; overflow-wrap: anywhere; }
#bar { display: flex; gap: .75rem; align-items: center; padding: .5rem 0;
  position: sticky; top: 0; background: Canvas; }
#step { flex: 1; }
#text { font: 15px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; min-height: 8rem; }
#text span { border-radius: .25rem; padding: .1rem 0; border-bottom: 3px solid transparent; }
.given { color: var(--given); }
.kept { color: var(--kept); }
.revised { color: var(--revised); font-weight: 600; }
.noisy { color: var(--noisy); }
#key span { margin-right: 1.25rem; }
button { min-width: 4.5rem; padding: .3rem .6rem; }
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text"), slider = document.getElementById("step");
const caption = document.getElementById("caption"), play = document.getElementById("play");
const names = ["given", "kept", "revised", "noisy"];
let timer = null;
function show(n) {
  const frame = data.frames[n];
  text.replaceChildren(...frame.ids.map((id, i) => {
    const span = document.createElement("span");
    const name = names[frame.fates[i]], sure = frame.sure[i];
    span.textContent = data.tokens[id];
    span.className = name;
    let title = "position " + i + ", " + name + ", token " + id;
    if (sure !== null) {
      title += ", confidence " + sure.toFixed(3);
      if (name !== "given" && name !== "noisy")
        span.style.borderBottomColor = "hsl(" + Math.round(120 * sure) + " 70% 45%)";
    }
    span.title = title;
    return span;
  }));
  slider.value = n;
  caption.textContent = "step " + n + " of " + (data.frames.length - 1) + ", block " + frame.block +
    ", log-SNR " + frame.level.toFixed(2);
}
function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
slider.max = data.frames.length - 1;
slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
play.addEventListener("click", () => {
  if (timer !== null) { stop(); return; }
  let n = Number(slider.value) === data.frames.length - 1 ? 0 : Number(slider.value);
  play.textContent = "Pause";
  timer = setInterval(() => { show(n); if (++n >= data.frames.length) stop(); }, 120);
});
const start = Number(new URLSearchParams(location.hash.slice(1)).get("step"));
show(location.hash.includes("step=") ? Math.min(start, data.frames.length - 1) : data.frames.length - 1);
"""


def trace_page(frames: Sequence[Frame], *, token_text: Callable[[int], str], about: str) -> str:
    """Return the page, with its last frame shown (`#step=N` in its address shows frame N).

    Args:
        frames: at least one.
        token_text: returns the text of an id; any string.
        about: a line under the title.
    """
    ids = sorted({token for frame in frames for token in frame.ids})
    data: dict[str, Any] = {
        "tokens": {token: _visible(token_text(token)) for token in ids},
        "frames": [
            {
                "ids": frame.ids,
                "fates": [int(fate) for fate in frame.fates],
                "sure": [None if value is None else round(value, 4) for value in frame.confidence],
                "block": frame.block,
                "level": round(frame.log_snr, 4),
            }
            for frame in frames
        ],
    }
    policy = (
        f"default-src 'none'; style-src 'sha256-{_hash(_STYLE)}'; script-src 'sha256-{_hash(_SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    key = "".join(f'<span class="{name}">{label}</span>' for name, label in _KEY)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>Denoising, step by step</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Denoising, step by step</h1>
<p id="about">{html.escape(about)}</p>
<p id="key">{key}<span>underline: confidence, red 0 to green 1</span></p>
<div id="bar"><button id="play" type="button">Play</button>
<input id="step" type="range" min="0" value="0" aria-label="step"><span id="caption"></span></div>
<div id="text" role="textbox" aria-readonly="true"></div>
<script type="application/json" id="data">{_embedded(data)}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(data: Any) -> str:
    """Return JSON that can neither end the script element nor start a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _visible(text: str) -> str:
    """Replace control characters and text directions by visible symbols; line ends are marked and kept."""
    shown = []
    for c in text:
        if c == "\n":
            shown.append("\u23ce\n")
        elif c == " " or c.isprintable():
            shown.append(c)
        else:
            shown.append(chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd")
    return "".join(shown) or "\u2205"
