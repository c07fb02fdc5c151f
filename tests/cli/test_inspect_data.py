"""The command that shows data: what it prints, its pages in a browser, and a sentence for every mistake."""

from __future__ import annotations

import html
import json
import re

import pytest
import yaml

from megadiff.data.indexed_format import tokenizer_facts
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.run.config import RunConfig
from megadiff.run.step_sequences import step_sequences
from tests.support.browser import browse, needs_chromium, title_of
from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree

TOOL = "tools/inspect_data.py"
BYTE = ByteTokenizer()
EVIL = "<img src=x onerror=document.title='owned'>"
TEXTS = [
    "the first document\nof two lines",
    f"{EVIL}</pre></div><script>document.title='owned'</script>",
    "an escape \x1b[31m and a direction \u202e",
    "the first document\nof two lines",
    "\u20ac and \U0001f600 between",
] * 20


def write_texts(prefix, texts):
    with IndexedWriter(prefix, vocab_size=BYTE.vocab_size) as writer:
        for text in texts:
            writer.add_document([*BYTE.encode(text), BYTE.eos_id])
        size = sum(len(text.encode()) for text in texts)
        writer.finish(tokenizer=tokenizer_facts(BYTE), source_bytes=size)
    return prefix


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return write_texts(folder / "train", TEXTS), write_texts(folder / "valid", ["held out", TEXTS[0]])


@pytest.fixture(scope="module")
def description(corpora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("description")
    dotted = {"model__seq_length": 48, "conditioning__prompt": 0.5, "conditioning__pad_insertion": 0.2}
    tree = toy_tree(corpora[0], folder / "runs", **dotted)
    tree["data"]["valid"] = [str(corpora[1])]
    return write_yaml(folder / "run.yaml", tree)


def shown(*words):
    ended = call_forked(TOOL, *words)
    assert (ended.code, ended.err) == (0, ""), ended.err
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", ended.out), "nothing that acts on a terminal"
    return ended.out


def test_sources_are_shown_with_what_they_share(corpora):
    out = " ".join(shown(*corpora, "--documents", 2).split())
    total = sum(len(text.encode()) + 1 for text in TEXTS)
    assert f"documents 100, none empty tokens {total:,} of 260 ids" in out
    assert "eos ends 100 documents (100.00%)" in out
    assert "repeated 96 documents (96.00%)" in out
    assert "document 0 (32 tokens) 40 times" in out
    assert f"in {corpora[0]} 1 document (50.00%) of these" in out
    assert "the first document\u23ceof two lines\u27e8eos\u27e9" in out
    assert re.search(r"entropy unigram \d\.\d{4} nats per token \(\d\.\d{3} bits per byte\), bigram", out)
    assert re.search(r"32 to 63 \d+ #+", out)


def test_one_document_is_shown_and_cut_where_asked(corpora):
    out = shown(corpora[0], "--document", 4, "--document", 1, "--tokens", 7)
    assert re.findall(r"document (\d+) +([\d,]+) tokens, the first 7:\n +\| (.*)", out) == [
        ("4", "21", "\u20ac and"),
        ("1", str(len(TEXTS[1]) + 1), EVIL[:7]),
    ]


def test_a_run_description_shows_its_sources(corpora, description):
    out = shown("--config", description, "--documents", 0)
    assert [line for line in out.splitlines() if line and line[0] == "/"] == [str(prefix) for prefix in corpora]


def test_without_a_tokenizer_ids_are_shown(corpora, tmp_path):
    prefix = tmp_path / "other"
    for kind in ("bin", "idx"):
        (tmp_path / f"other.{kind}").write_bytes(corpora[0].with_suffix(f".{kind}").read_bytes())
    manifest = json.loads(corpora[0].with_suffix(".json").read_text())
    manifest["tokenizer"] |= {"fingerprint": "0" * 64, "name": "lost"}
    prefix.with_suffix(".json").write_text(json.dumps(manifest))
    out = shown(prefix, "--document", 0, "--tokens", 3)
    assert f"    | {' '.join(map(str, BYTE.encode('the')))}\n" in out
    assert out.endswith("ids are shown where no tokenizer is known; --tokenizer PATH decodes them\n")
    ended = call_forked(TOOL, prefix, "--tokenizer", "byte")
    assert (ended.code, ended.out) == (2, "")
    assert re.search(r"other: made with tokenizer lost \(0{12}\), found byte .*; give the first one's", ended.err)


def test_a_step_is_shown_as_it_is_read(description):
    out = shown("--config", description, "--step", 4, "--sequences", 8, "--table")
    config = RunConfig.model_validate(yaml.safe_load(description.read_text()))
    found = step_sequences(config, 4, sequences=0)
    assert "step 4 of 10: samples 24 to 31, 8 of 8 sequences shown, method gidd" in out
    parts = re.split(r"\nsample (\d+)\n", out)[1:]
    assert [int(sample) for sample in parts[::2]] == list(range(24, 32))
    for part, sequence in zip(parts[1::2], found.sequences, strict=True):
        rows = re.findall(
            r"^ +\d+ +\u00b6?(\d+) +(\d+) .*? +(\d+) '?.* (given|kept|masked|changed)", part, re.MULTILINE
        )
        assert [(int(document), int(clean), state) for document, clean, _, state in rows] == [
            (token.document, token.clean, token.state) for token in sequence.tokens
        ]
        clean, noised = re.split("  model's input\n", part.partition("  targets\n")[2])
        lines = ["".join(re.findall(r"^    \| (.*)\n", text, re.MULTILINE)) for text in (clean, noised)]
        assert lines[0].count("\u00b6") == sum(token.begins_document for token in sequence.tokens)
        assert lines[1].count("\u2591") == sequence.count("masked")
        own = sum(token.noised_text.count("{") for token in sequence.tokens)
        assert lines[1].count("{") - own == sequence.count("changed")


def test_next_token_shows_targets_and_inputs_without_marks(description):
    out = shown("--config", description, "--step", 1, "--sequences", 1, "method.name=next_token")
    assert "noise" not in out.partition("sample 0")[2]
    targets, inputs = re.findall(r"(?:targets|model's input)\n    \| (.*)", out)
    assert inputs.startswith("\u27e8bos\u27e9")
    assert targets.replace("\u00b6", "")[:40] == inputs.removeprefix("\u27e8bos\u27e9")[:40]


@pytest.fixture(scope="module")
def pages(corpora, description, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    words = [(folder / "sources.html", corpora), (folder / "step.html", ["--config", description, "--step", 2])]
    for page, rest in words:
        assert re.search(rf"\n{re.escape(str(page))}: 0\.\d MB\n$", shown(*rest, "--html", page))
    assert sorted(path.name for path in folder.iterdir()) == ["sources.html", "step.html"]
    return [page for page, _ in words]


def test_pages_load_nothing_and_show_every_token(pages, description):
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "default-src 'none'" in text
        assert "<script" not in text
        assert not re.search(r"(src|href)=[\"']?(https?:|//)", text)
    titles = re.findall(r'<span class="[^"]*" title="position (\d+), document \d+: target (\d+)', text)
    config = RunConfig.model_validate(yaml.safe_load(description.read_text()))
    tokens = [token for sequence in step_sequences(config, 2, sequences=4).sequences for token in sequence.tokens]
    targets = [int(target) for _, target in titles]
    assert len(targets) == 2 * len(tokens)
    assert sorted(targets) == sorted([token.clean for token in tokens] * 2)
    assert text.count('class="masked') >= sum(token.state == "masked" for token in tokens)


@needs_chromium
@pytest.mark.parametrize("which", [0, 1])
def test_nothing_of_a_document_runs_in_a_browser(pages, tmp_path, which):
    dom, complaints = browse(pages[which], tmp_path, "--dump-dom")
    assert complaints == ""
    assert html.unescape(title_of(dom)) != "owned"
    assert "<img" not in dom


@needs_chromium
def test_a_screenshot_shows_masks_and_changed_tokens(pages, tmp_path):
    image = pytest.importorskip("PIL.Image")
    browse(pages[1], tmp_path, "--window-size=1280,1600", f"--screenshot={tmp_path}/page.png")
    colours = {colour[:3]: count for count, colour in image.open(tmp_path / "page.png").getcolors(2**24)}
    assert colours.get((0x44, 0x44, 0x44), 0) > 300, "masked"
    assert colours.get((0xD5, 0x5E, 0x00), 0) > 300, "changed"


MISTAKES = [
    ("", "wanted prefixes of indexed data, or --config F with a run description; found neither"),
    ("{tmp}/nothing", "{tmp}/nothing: no indexed data; .*; run `megadiff preprocess_data` first"),
    ("{train} --tokenizer {tmp}/none", "{tmp}/none"),
    ("{train} --document 100", "wanted document 100, found the documents 0 to 99; give one of them"),
    ("{train} --tokens 0", "--tokens must be at least 1, got 0"),
    ("{train} --documents=-1", "--documents must be at least 0, got -1"),
    ("{train} --step 3", "--step 3 is a step of a run; give its description with --config F"),
    ("{train} --table", "--table needs --step; leave it out, or give a step"),
    ("{train} --html {tmp}/page.txt", "--html {tmp}/page.txt: a name that ends in .html is wanted"),
    ("{train} --html {tmp}/no/page.html", "--html {tmp}/no/page.html: there is no folder"),
    ("--config {run} --step 11", r"--step 11: the run toy has the steps 1 to 10 \(schedule.steps = 10\); give one"),
    ("--config {run} --step 1 --documents 3", "--documents does not go with --step; leave it out"),
    ("--config {run} --tokenizer byte", "--tokenizer is for prefixes; with --config, set data.tokenizer=PATH"),
    ("--config {run} --step 1 data.train=[{tmp}/gone]", r"data.train\[0\]: {tmp}/gone: no indexed data"),
    ("--config {run} --step 1 data.tokenizer={tmp}/none", "data.tokenizer: {tmp}/none"),
    ("--config {run} --step 1 {train}", "is not of the form key.sub=value"),
    ("--config {run} --step one", "--step: wants an integer, found 'one'"),
    ("--config {tmp}/none.yaml", "{tmp}/none.yaml"),
    ("--config {run} --steps 3", "--steps"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES)
def test_mistakes_get_one_sentence(corpora, description, tmp_path, words, sentence):
    places = {"tmp": tmp_path, "train": corpora[0], "run": description}
    ended = call_forked(TOOL, *words.format(**places).split())
    assert (ended.code, ended.out) == (2, "")
    assert re.search(sentence.format(**places), ended.err), ended.err
    assert len(ended.err.splitlines()) == 1
    assert not any(tmp_path.iterdir())
