"""The record of a denoising, its page and its picture in the terminal."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess

import pytest
import torch
from rich.console import Console

from megadiff.data.tokenizers import token_text
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.diffusion.mixing import HybridMixing
from megadiff.sampling.standalone import Settings, Step, generate
from megadiff.sampling.trace import Fate, Frame, LiveDenoising, Trace, trace_page

TOKENS = ByteTokenizer()
TEXT = TOKENS.encode('Prompt: </script><script>alert(1)</script> & "quotes"\nand \x1b[31m more of it')


def spelled(shift: float, *, given: int = 8, block: int | None = 20, sampler: str = "ancestral") -> Trace:
    """A denoising that ends in TEXT."""
    process = HybridMixing(TOKENS.vocab_size, TOKENS.mask_id, shift)
    wanted = torch.tensor(TEXT)
    prompt = wanted[None, :given]
    trace = Trace(prompt[0].tolist(), TOKENS.mask_id)
    settings = Settings(max_new_tokens=len(TEXT) - given, max_denoising_steps=8, block_length=block, sampler=sampler)
    generate(
        lambda ids, _: 12.0 * torch.nn.functional.one_hot(wanted[: ids.shape[1]], 260).float()[None], prompt,
        settings, process, on_step=trace,
    )  # fmt: skip
    return trace


@pytest.mark.parametrize("shift", [-1000.0, 0.0, 1000.0])
def test_frames_tell_what_became_of_every_position(shift):
    trace = spelled(shift)
    first, last = trace.frames[0], trace.frames[-1]
    assert first.fates == [Fate.GIVEN] * 8 + [Fate.NOISY] * (len(TEXT) - 8)
    assert last.ids == TEXT
    for place, fate in enumerate(last.fates):
        never_written = len({frame.ids[place] for frame in trace.frames}) == 1
        assert (fate == Fate.NOISY) == (never_written and place >= 8)
    assert [frame.block for frame in trace.frames] == sorted(frame.block for frame in trace.frames)
    assert last.block == -(-(len(TEXT) - 8) // 20)
    for before, after in zip(trace.frames, trace.frames[1:], strict=False):
        for place, fate in enumerate(after.fates):
            changed = before.ids[place] != after.ids[place]
            assert (fate == Fate.REVISED) == changed or after.ids[place] == TOKENS.mask_id
    sure = [value for value in last.confidence if value is not None]
    assert len(sure) == (len(TEXT) - 8) % 20 or len(sure) == 20
    assert min(sure) > 0.9


def test_a_trace_changes_nothing():
    table = torch.randn(260, 260, generator=torch.Generator().manual_seed(0))
    for sampler in ("ancestral", "adaptive"):
        process, texts = HybridMixing(260, 3, 0.0), []
        for trace in (None, Trace([5], 3)):
            settings = Settings(max_new_tokens=9, max_denoising_steps=4, sampler=sampler)
            texts.append(
                generate(lambda ids, _: table[ids], torch.tensor([[5]]), settings, process, on_step=trace).sequences
            )
        assert torch.equal(*texts)


def page_of(trace: Trace) -> str:
    return trace_page(trace.frames, token_text=token_text(TOKENS), about="a run, with <b>markup</b> & quotes")


def test_the_page_spells_no_markup_of_tokens_and_loads_nothing():
    page = page_of(spelled(0.0))
    assert page.count("<script") == 2  # the data and the page's own
    assert "alert(1)" not in page.replace("\\u003c", "<").split('id="data">')[0]
    assert "<b>markup" not in page
    assert "\x1b" not in page
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\son[a-z]+=", page)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1]
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        assert inside
        want = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{want}'" in policy[1]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert len(data["frames"]) == len(spelled(0.0).frames)
    assert "".join(data["tokens"][str(i)] for i in data["frames"][-1]["ids"]).startswith("Prompt: </script>")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (apt-get install chromium)")
def test_a_browser_draws_the_page_and_runs_its_script(tmp_path):
    path, shot = tmp_path / "trace.html", tmp_path / "shot.png"
    path.write_text(page_of(spelled(0.0)), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    address = f"{path.as_uri()}#step=9999"
    done = subprocess.run([*command, "--dump-dom", address], text=True, capture_output=True, timeout=600)
    body = done.stdout.split('<div id="text"')[1].split('<script type="application/json"')[0]
    assert body.count("<span") == len(TEXT), done.stderr[-500:]
    assert 'class="kept"' in body
    assert "&lt;" in body
    assert "alert(1)" in re.sub(r"<[^>]*>", "", body)  # shown as text, letter by letter
    subprocess.run(
        [*command, "--window-size=900,600", f"--screenshot={shot}", address], capture_output=True, timeout=120
    )
    assert shot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert shot.stat().st_size > 5000


def test_the_terminal_shows_colours_and_no_control_character():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, color_system="standard")
    frame = Frame(3, 1, 0.0, [*TOKENS.encode("ab\x1b"), TOKENS.mask_id], list(Fate), [None, 0.5, 0.5, 0.1])
    with LiveDenoising(token_text(TOKENS), mask_id=TOKENS.mask_id, console=console) as live:
        live(frame)
        picture = live.picture(frame)
    with console.capture() as shown:
        console.print(picture)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.get())
    assert "block 1, 3 steps left" in plain
    assert "ab\ufffd\u2591" in plain
    assert "\x1b" not in plain
    quiet = io.StringIO()
    with LiveDenoising(token_text(TOKENS), mask_id=3, console=Console(file=quiet)) as live:
        live(frame)
    assert quiet.getvalue() == ""


def test_tokens_look_as_they_do_in_running_text():
    class Words(ByteTokenizer):
        """Joins words with a space, which decoding one alone drops (as SentencePiece does)."""

        def decode(self, ids):
            return " ".join("word" for _ in ids)

    assert token_text(Words())(9) == " word"
    look = token_text(TOKENS)
    assert [look(i) for i in (0, 1, 2, 3, 4 + ord("x"))] == ["⟨bos⟩", "⟨eos⟩", "⟨pad⟩", "░", "x"]


def test_initial_noise_that_no_step_overwrites_stays_noise_to_the_end():
    """Position 1 is written, position 2 never: what stands there is the noise the sampler began with."""
    trace = Trace([5], mask_id=0)
    for steps_left, ids in ((2, [5, 7, 8]), (1, [5, 9, 8]), (0, [5, 9, 8])):
        trace(Step(steps_left, 0.0, torch.tensor([ids]), 0, 3, lambda: torch.ones(1, 3)))
    assert trace.frames[-1].fates == [Fate.GIVEN, Fate.KEPT, Fate.NOISY]
