"""A self-contained HTML page of a denoising: a slider over its steps, a colour for each token's state.

The page contains no address of another machine and may load none: its policy allows only this page's own style and
script, by their hashes. Tokens are embedded as JSON that cannot contain markup, and are inserted as text.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Callable, Sequence
from typing import Any

from megadiff.sampling.trace import Frame

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


_KEY = (("given", "prompt"), ("kept", "kept"), ("revised", "written in this step"), ("noisy", "noise, not written"))


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
