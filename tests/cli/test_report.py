"""The report of real runs: the command's words, the page in a browser, and run folders left as they were."""

from __future__ import annotations

import hashlib
import html
import json
import re
import subprocess
import sys

import pytest

from tests.support.browser import browse, needs_chromium, title_of
from tests.support.commands import REPOSITORY, call
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_all

EVIL = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def runs(toy_corpus, tmp_path_factory):
    """Two toy runs with checkpoints and evaluations, one of them under a hostile name and still being written."""
    output = tmp_path_factory.mktemp("report")
    shared = {"schedule__steps": 6, "checkpoint__every": 3, "eval__every": 2}
    configs = [
        toy_config(toy_corpus, output, name="plain", **shared),
        toy_config(toy_corpus, output, name="other", noise__shift="masked", **shared),
    ]
    on_ranks(1, train_all, configs, 1, save=True)
    evil = configs[1].folder.rename(output / EVIL)
    with (evil / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tokens"')
    (evil / "samples").mkdir()
    (evil / "samples/step_00000006.txt").write_text(f"</pre><script>document.title='owned'</script>{EVIL}")
    return [configs[0].folder, evil]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The page's path; made once, with the folders' bytes compared around it."""
    before = [digest_of(run) for run in runs]
    output = tmp_path_factory.mktemp("page") / "report.html"
    code, out, err = call("tools/report.py", *runs, "--output", output)
    assert code == 0, err
    assert out.startswith(f"{output}: 2 runs, ")
    assert [digest_of(run) for run in runs] == before
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    return output


def digest_of(folder):
    """Of every name, size, time of change and byte below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path} {path.lstat().st_size} {path.lstat().st_mtime_ns} {path.lstat().st_mode}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def test_real_runs_are_told_in_full(page):
    """Numbers of the files, the differing settings, the checkpoints; no address of another machine."""
    text = page.read_text(encoding="utf-8")
    assert text.count(" (LATEST)</td><td>whole</td>") == 2
    assert "<code>noise.shift</code></th><td>balanced</td><td>masked</td>" in text
    assert "<code>optimizer.lr</code>" not in text
    assert re.search(r"\d\.\d{4} \u00b1 \d\.\d{4} at step [246]", text)
    assert "log-SNR -3 to 0" in text
    assert "damaged" not in text
    assert not re.search(r"https?:|//[a-z]", text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["{tmp}/none"],
            "error: {tmp}/none is no folder; give the folder of a run, the one that holds metrics.jsonl\n",
        ),
        (["{tmp}"], "error: {tmp} holds no metrics.jsonl; give a run folder\n"),
        (["{run}", "--output", "{tmp}/no/r.html"], "there is no folder {tmp}/no; make it, or name another one\n"),
        (["{run}", "--output", "{run}/metrics.jsonl"], "a name that ends in .html is wanted"),
    ],
)
def test_mistakes_get_one_sentence(runs, tmp_path, arguments, said):
    places = {"tmp": tmp_path, "run": runs[0]}
    code, out, err = call_forked("tools/report.py", *(word.format(**places) for word in arguments))
    assert (code, out) == (2, "")
    assert said.format(**places) in err
    assert len(err.splitlines()) == 1


def test_it_starts_without_what_trains():
    """Neither torch nor megatron nor NumPy is loaded, so that it starts at once and on any machine."""
    code = (
        "import sys, megadiff.report.page, megadiff.report.run_record\n"
        "print([name for name in ('torch', 'megatron', 'numpy') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


PROBE = """<script>
const plot = document.querySelector("svg.plot"), box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 15 * box.width / 460, clientY: box.top + 9}));
const shown = name => getComputedStyle(plot.parentNode.querySelector("." + name)).display;
const before = [shown("only-linear"), shown("only-log")].join();
document.getElementById("log").checked = true;
const after = [shown("only-linear"), shown("only-log")].join();
const root = document.documentElement;
parent.postMessage(JSON.stringify({ tip: tip.hidden ? "" : tip.textContent, before, after,
  isTooWide: root.scrollWidth > innerWidth, width: innerWidth }), "*");
</script>"""


FRAME = """<title></title><script>onmessage = event => {{ document.title = event.data; }};</script>
<iframe src="probed.html" width="{width}" height="900" frameborder="0"></iframe>"""


@needs_chromium
def test_nothing_of_a_runs_name_or_sample_runs_in_a_browser(page, tmp_path):
    dom, complaints = browse(page, tmp_path, "--dump-dom")
    assert title_of(dom).startswith("plain, &lt;img src=x")
    assert "<img" not in dom
    assert complaints == ""


@needs_chromium
def test_a_name_that_is_not_escaped_would_be_noticed(page, tmp_path):
    """The control of the test above: the same page with the name as markup, with and without its policy."""
    text = page.read_text(encoding="utf-8").replace("<header>", f"<header>{EVIL}")
    guarded, open_ = tmp_path / "guarded.html", tmp_path / "open.html"
    guarded.write_text(text, encoding="utf-8")
    open_.write_text(without_policy(text), encoding="utf-8")
    dom, complaints = browse(guarded, tmp_path, "--dump-dom")
    assert title_of(dom) != "owned"
    assert "Content Security Policy" in complaints
    assert title_of(browse(open_, tmp_path, "--dump-dom")[0]) == "owned"


@needs_chromium
@pytest.mark.parametrize("width", [400, 1280])
def test_values_are_said_under_the_pointer_and_the_page_fits(runs, page, tmp_path, width):
    """At the right end of the held-out curve: the last step's tokens and a value for each run.

    In a frame, because a browser's window cannot be as narrow as a telephone's.
    """
    probed, frame = tmp_path / "probed.html", tmp_path / "frame.html"
    probed.write_text(without_policy(page.read_text(encoding="utf-8")).replace("</body>", f"{PROBE}</body>"))
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    dom, complaints = browse(frame, tmp_path, "--dump-dom", "--virtual-time-budget=3000")
    assert complaints == ""
    said = json.loads(html.unescape(title_of(dom)))
    assert (said["before"], said["after"]) == ("block,none", "none,block")
    assert (said["width"], said["isTooWide"]) == (width, False)
    tokens, *values = said["tip"].splitlines()
    assert tokens == "768 tokens seen"
    numbers = dict(value.rsplit(": ", 1) for value in values)
    for run in runs:
        assert float(numbers[run.name]) == pytest.approx(last_bound(run), rel=2e-3)


def last_bound(run):
    """The last held-out bound, by a reader of the test's own."""
    text = (run / "metrics.jsonl").read_text()
    return float(re.findall(r'"eval_elbo": ([\d.]+)', text)[-1])


@needs_chromium
def test_a_screenshot_shows_curves(page, tmp_path):
    image = pytest.importorskip("PIL.Image")
    browse(page, tmp_path, "--window-size=1280,1600", f"--screenshot={tmp_path}/page.png")
    colours = {colour[:3]: count for count, colour in image.open(tmp_path / "page.png").getcolors(2**24)}
    assert colours.get((0x00, 0x72, 0xB2), 0) > 300, "the first run's colour"
    assert colours.get((0xD5, 0x5E, 0x00), 0) > 300, "the second run's colour"


def without_policy(text):
    """The page with its policy taken out, for what a test adds to it."""
    changed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert changed != text
    return changed
