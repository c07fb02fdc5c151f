"""The page: whole without a network, nothing from a file is markup, what is missing is said."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import datetime, timezone
from html.parser import HTMLParser

import pytest

from megadiff.data.facts import DataFacts, write_data_facts
from megadiff.report.line_chart import Chart, Curve, Point
from megadiff.report.page import report_page
from megadiff.report.run_record import read_runs
from megadiff.scaling.paired import EvaluationNoise, PerSequence
from megadiff.train.goodput import Attempt, write_attempts
from tests.report.folders import evaluation_line, training_line, write_run

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
EVIL = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"


class Parsed(HTMLParser):
    """Elements with their attributes, in order, and the text of styles and scripts."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.own, self.open = [], {}, []
        self.feed(page)
        assert self.open == [], "elements left open"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["style"], ["script"]):
            self.own[self.open[-1]] = data


def page_of(*folders, **options):
    return report_page(read_runs(list(folders)), now=NOW, **options)


@pytest.fixture
def full(tmp_path):
    """A run with something of everything, every word of it hostile."""
    lines = [evaluation_line(0, 5.5)]
    lines += [training_line(step, **({"skipped": EVIL, "loss": None} if step == 3 else {})) for step in range(1, 9)]
    sources = {EVIL: [1.0, 0.5], "b": [2.0, None]}
    folder = write_run(tmp_path / "<b>run&", [*lines, evaluation_line(8, eval_elbo_by_source=sources)])
    (folder / "log.txt").write_text(f"x WARNING step 5: spike: {EVIL}\n")
    (folder / "config.yaml").write_text(f'model: {{layers: 4}}\n"{EVIL}": "{EVIL}"\n')
    (folder / "samples").mkdir()
    (folder / "samples/step_00000004.txt").write_text(f"text {EVIL} \u202egnirts\n</pre>")
    attempt = Attempt(started=0, updated=10, elapsed_s=10, phases={"step": 6, "setup": 2}, last_step=8, steps=8)
    write_attempts(folder / "goodput.json", [attempt])
    status = '{"state": "failed", "step": 8, "steps": 9, "reason": "%s", "exit_code": 1, "job": "%s", "attempt": 0,'
    (folder / "status.json").write_text((status + ' "host": "%s", "time": "%s"}') % ((EVIL,) * 4))
    return folder


def test_nothing_from_a_file_is_markup(full):
    page = page_of(full)
    found = Parsed(page)
    assert sum(tag == "script" for tag, _ in found.elements) == 1
    assert not {"img", "b", "iframe", "object", "link", "a"} & {tag for tag, _ in found.elements}
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert page.count("&lt;script&gt;") >= 8
    assert "\u202e" not in page


def test_the_page_may_load_nothing_and_its_hashes_are_right(full):
    page = page_of(full)
    found = Parsed(page)
    policy = next(a["content"] for t, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(found.own[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?:|//[a-z]|url\(|@import|xlink", page)
    assert not [a for _, a in found.elements if {"src", "href", "style"} & set(a)]


def test_ids_are_unique_and_every_drawing_has_a_name(full):
    found = Parsed(page_of(full))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    drawings = [attributes for tag, attributes in found.elements if tag == "svg" and attributes.get("role") == "img"]
    assert len(drawings) > 10
    for drawing in drawings:
        named = drawing.get("aria-labelledby", "").split()
        assert drawing.get("aria-label") or (named and set(named) <= set(ids))


def test_every_part_is_told(full, tmp_path):
    other = write_run(tmp_path / "other", [training_line(1)])
    page = page_of(full, other)
    for said in (
        "3.2500 ± 0.1250",
        "60.0 %",
        "log-SNR -9 to -6",
        "step 4</summary>",
        "Without a readable goodput.json: other.",
        "No checkpoint in: &lt;b&gt;run&amp;, other.",
        "Without a readable config.yaml: other.",
        "8 of 9",
    ):
        assert said in page, said


def test_what_is_missing_everywhere_is_said(tmp_path):
    page = page_of(write_run(tmp_path / "bare", [{"step": 1, "tokens": 9}], tail="broken\n"))
    for said in (
        "bare: 1 line(s) of metrics.jsonl are damaged and left out.",
        "No run recorded this.",
        "No run recorded figures by noise level.",
        "No step was skipped and no spike was noted.",
        "No run has a samples folder.",
        "not recorded",
    ):
        assert said in page, said


def test_seconds_stand_under_their_own_heads(full):
    """60 % of ten seconds in steps, 2 s in setting up, 2 s elsewhere."""
    page = page_of(full)
    at = page.index("Wall time by use")
    heads = re.findall(r'<th scope="col">(.*?)</th>', page[at:])[1:9]
    cells = re.findall(r"<td>(.*?)</td>", page[at:])[:8]
    spent = dict(zip(heads, cells, strict=True))
    assert (spent["steps that counted"], spent["setting up"], spent["elsewhere"]) == ("6.0 s", "2.0 s", "2.0 s")


def test_settings_that_differ_stand_side_by_side(tmp_path):
    folders = []
    for name, layers in (("a", 4), ("b", 8)):
        folders.append(write_run(tmp_path / name, [training_line(1)]))
        (folders[-1] / "config.yaml").write_text(f"name: {name}\nmodel: {{layers: {layers}, heads: 2}}\n")
    page = page_of(*folders)
    assert '<th scope="row"><code>model.layers</code></th><td>4</td><td>8</td>' in page
    assert "<code>model.heads</code>" not in page
    (folders[1] / "config.yaml").write_text("name: b\nmodel: {layers: 4, heads: 2}\n")
    assert "The runs have the same settings." in page_of(*folders)


def drawn(chart, kind):
    """The places of a chart's first curve, [(x, y)], in the drawing of a kind."""
    svg = re.search(rf'<svg class="plot only-{kind}".*?</svg>', chart.figure(), re.S)
    assert svg
    path = re.search(r'<path class="curve[^"]*" data-label="[^"]*" d="([^"]*)"', svg[0])
    assert path
    return path[1], [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path[1])]


def chart_of(*points, **options):
    curve = Curve("run", 0, [Point(*point) for point in points])
    return Chart(name="c", title="t", x_label="steps", y_label="nats", curves=[curve], **options)


def test_a_curve_lies_where_its_values_are():
    """The middle value of three is drawn in the middle, and larger is higher."""
    _, places = drawn(chart_of((0, 1.0), (5, 2.0), (10, 3.0)), "linear")
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.02)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.02)
    assert y0 > y2


def test_logarithmic_axes_straighten_power_laws_and_omit_non_positives():
    _, places = drawn(chart_of((0, 8.0), (1, 100.0), (10, 10.0), (100, 1.0), (1000, 0.0)), "log")
    (x0, y0), (x1, y1), (x2, y2) = places
    assert (y1 - y0) / (x1 - x0) == pytest.approx((y2 - y1) / (x2 - x1), rel=1e-3)


def test_linear_axes_are_linear_in_every_chart(full):
    """`data-y` ends in 1 where the axis is logarithmic; the page shows one of the two drawings of each chart."""
    drawings = [a for tag, a in Parsed(page_of(full)).elements if tag == "svg" and "data-y" in a]
    assert len(drawings) == 20
    for drawing in drawings:
        assert drawing["data-y"].endswith(",1") == ("only-log" in drawing["class"])


def test_baselines_are_lines_of_the_held_out_chart_and_table_columns(tmp_path):
    figures = {"eval_unigram": 6.4896, "eval_bigram": 4.4414}
    one = write_run(tmp_path / "one", [training_line(4), *(evaluation_line(s, 6.0, **figures) for s in (2, 4))])
    other = write_run(
        tmp_path / "other", [training_line(3), evaluation_line(3, 5.5, **{**figures, "eval_bigram": 4.5})]
    )
    chart = page_of(one, other)
    labels = [a["data-label"] for tag, a in Parsed(chart).elements if tag == "path" and "data-label" in a]
    shown = {label: labels.count(label) for label in labels if "gram" in label}
    assert shown == {"unigram 6.4896": 2, "bigram 4.4414": 2, "bigram 4.5000": 2}  # linear and logarithmic
    assert "<td>6.49</td><td>4.441</td>" in chart


def test_a_value_that_was_not_finite_breaks_the_line():
    line, places = drawn(chart_of((0, 1.0), (1, None), (2, 2.0), (3, 1.5)), "linear")
    assert line.count("M") == 2
    assert len(places) == 3
    assert line.startswith("M")
    assert "h0M" in line  # a value alone shows as a dot


def test_error_bars_reach_one_standard_error():
    curve = Curve("run", 0, [Point(0, 2.0, 0.5), Point(1, 3.0, 0.5)], has_dots=True)
    figure = Chart(name="c", title="t", x_label="x", y_label="y", curves=[curve]).figure()
    assert "run: 2.0000 ± 0.5000" in figure
    svg = figure[: figure.index("</svg>")]
    (up,) = re.findall(r'cy="([\d.]+)"', svg)[:1]
    (top, foot) = re.findall(r'd="M[\d.-]+ ([\d.]+)h6m-3 0V([\d.]+)m', svg)[0]
    one = abs(float(re.findall(r'cy="([\d.]+)"', svg)[1]) - float(up)) / 2  # half a unit is half the two dots' distance
    assert float(foot) - float(up) == pytest.approx(one, abs=0.02)
    assert float(up) - float(top) == pytest.approx(one, abs=0.02)


def test_a_long_run_makes_a_small_page(tmp_path):
    lines = [training_line(step) for step in range(1, 20_001)]
    assert len(page_of(write_run(tmp_path / "long", lines))) < 400_000


def test_curves_can_run_over_steps(full):
    assert "optimizer steps" in page_of(full, axis="steps")
    assert "tokens seen" in page_of(full)


def test_the_data_are_a_table_of_sources_with_their_epochs_and_doubts(tmp_path):
    folder = write_run(tmp_path / "run", [training_line(1), training_line(2, epochs={"<big>": 0.125, "small": 2.5})])
    source = {"key": "data.train[0]", "source": "<big>", "tokens": 91003, "sequences": 5687, "share": 0.75}
    small = {**source, "source": "small", "tokens": 912, "sequences": 57, "share": 0.25}
    facts = DataFacts.model_validate(
        {
            "step": 0,
            "fingerprint": "f",
            "train": [
                {**source, "epochs_now": 0, "epochs_at_end": 0.25},
                {**small, "epochs_now": 0, "epochs_at_end": 5},
            ],
            "valid": [{**small, "key": "data.valid[0]", "source": "v", "measured": 7, "measured_tokens": 112}],
            "advice": ["<b>small is repeated</b>"],
        }
    )
    write_data_facts(folder, facts)
    page = report_page(read_runs([folder]), now=NOW)
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    cells = [re.sub(r"<[^>]*>", "|", row).replace("||", "|").strip("|").split("|") for row in rows]
    assert ["run", "&lt;big&gt;", "91,003", "5,687", "75.0 %", "0.125", "0.25"] in cells
    assert ["run", "small", "912", "57", "25.0 %", "2.5", "5"] in cells
    assert ["run", "v", "912", "57", "7", "112"] in cells
    assert "run: &lt;b&gt;small is repeated&lt;/b&gt;." in page
    write_run(tmp_path / "without", [training_line(1)])
    assert 'id="data"' not in report_page(read_runs([tmp_path / "without"]), now=NOW)


def test_last_evaluations_are_compared_sequence_by_sequence(tmp_path):
    draws = EvaluationNoise(0, 4, (-9.0, 9.0))
    base = (3.0, 4.0, 5.0, 2.0)
    bounds = {"a": base, "b": (2.9, 3.8, 4.9, 1.8), "c": base}
    folders = []
    for name, elbo in bounds.items():
        folder = write_run(tmp_path / name, [training_line(10), evaluation_line(10)])
        found = PerSequence("f" if name != "c" else "g", draws, elbo)
        (folder / "validation.jsonl").write_text(json.dumps({"step": 10, **found.as_entries()}) + "\n")
        folders.append(folder)
    folders.append(write_run(tmp_path / "d", [training_line(10), evaluation_line(10)]))
    page = page_of(*folders)
    assert "<td>-0.1500 \u00b1 0.0289</td><td>-0.2418 to -0.0582</td><td>0.9224</td>" in page
    assert "evaluated on different sequences (4 with the fingerprint g and 4 with f)" in page
    assert "d has no record of single sequences" in page
    assert "error without pairs" not in page_of(folders[0])


def test_gradient_noise_is_drawn_for_runs_that_measured_it(tmp_path):
    plain = write_run(tmp_path / "plain", [training_line(step) for step in (1, 2, 3)])
    assert "Gradient noise scale" not in page_of(plain)
    noise = {"gradient_noise/scale_stderr": 4.0, "gradient_noise/noise_share": 0.6}
    lines = [{"step": step, "gradient_noise/scale": scale, **noise} for step, scale in ((2, 30.0), (3, None))]
    found = page_of(plain, write_run(tmp_path / "run", [*(training_line(step) for step in (1, 2, 3)), *lines]))
    assert "Gradient noise scale" in found
    assert "Gradient variance from noise draws" in found
