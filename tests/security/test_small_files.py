"""Small files of a run folder as somebody else may have left them: huge, deep or special."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket

import pytest
import yaml

from megadiff.checkpoint.folder import entry_of, newest_complete
from megadiff.checkpoint.manifest import FILE_NAME, read_manifest
from megadiff.config.load import load_config
from megadiff.errors import CheckpointError, ConfigError, DataError, MegadiffError
from megadiff.files import UnreadableFileError, lines, parse_json, read_bytes, read_json_object
from megadiff.metric_lines import read_metrics
from megadiff.report.line_chart import scale_of
from megadiff.run.config import RunConfig
from megadiff.supervision.status import RUNNING, Status, read_status, write_status
from megadiff.train.goodput import read_attempts
from tests.checkpoint.test_manifest import manifest
from tests.report.folders import evaluation_line, training_line, write_run
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree

DEEP = b"[" * 300_000
DIGITS = b"9" * 5000


def sparse(path):
    with path.open("wb") as file:
        file.truncate(2**33)


def bound_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL = {
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": bound_socket,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "8 GB": sparse,
    "deep": lambda path: path.write_bytes(b'{"step": ' + DEEP),
    "5,000 digits": lambda path: path.write_bytes(b'{"step": ' + DIGITS + b"}"),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "LATEST of 5,000 digits": lambda path: path.write_bytes(b"step_" + DIGITS),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_small_json_file_is_refused_by_what_it_is(tmp_path, kind):
    SPECIAL[kind](tmp_path / "file")
    with pytest.raises((UnreadableFileError, OSError)):
        read_json_object(tmp_path / "file", max_bytes=10**6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 65 + b"]" * 65, "nested deeper than 64 levels"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
        (DEEP, "nested deeper than 64 levels|not JSON"),
        (DIGITS, "an integer of thousands of digits"),
        (b"\xff", "not UTF-8"),
        (b"{", "not JSON"),
    ],
)
def test_json_that_is_none_or_too_deep_is_refused(text, reason):
    with pytest.raises(UnreadableFileError, match=reason):
        parse_json(text)


def test_json_as_other_programs_write_it_is_read():
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_json('[NaN, 1e400, {"a": null}]')[1] == math.inf


def test_a_file_of_just_the_size_is_read_and_one_more_byte_is_not(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 10)
    assert read_bytes(tmp_path / "file", max_bytes=10) == b"x" * 10
    with pytest.raises(UnreadableFileError, match="has 10 bytes where at most 9 are wanted"):
        read_bytes(tmp_path / "file", max_bytes=9)


def test_lines_are_bounded_and_the_next_one_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"a\n" + b"b" * 100 + b"\nc\n" + b"d" * 9 + b"\ne")
    assert list(lines(tmp_path / "file", max_bytes=10)) == [b"a\n", None, b"c\n", b"d" * 9 + b"\n", b"e"]


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_status_that_is_none_is_no_status(tmp_path, kind):
    SPECIAL[kind](tmp_path / "status.json")
    assert read_status(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [{"step": "x"}, {"step": True}, {"steps": 10**30}, {"reason": []}, {"job": 3}, {"state": ["running"]}, {"host": 1}],
)
def test_a_status_with_a_value_that_no_run_writes_is_no_status(tmp_path, change):
    write_status(tmp_path, Status.now(RUNNING, step=1, steps=2))
    found = json.loads((tmp_path / "status.json").read_text())
    assert read_status(tmp_path) == Status(**found)
    (tmp_path / "status.json").write_text(json.dumps({**found, **change}))
    assert read_status(tmp_path) is None


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_hint_that_is_none_is_not_followed(tmp_path, kind):
    """The newest whole checkpoint is taken; without any, the run is refused in a sentence, for it has saved before."""
    SPECIAL[kind](tmp_path / "LATEST")
    step = tmp_path / "checkpoints/step_00000003"
    step.mkdir(parents=True)
    (step / "shard").write_bytes(b"x")
    manifest(step=3, files={"shard": entry_of(step / "shard")}).write(step)
    assert newest_complete(tmp_path) == step
    shutil.rmtree(step)
    with pytest.raises(CheckpointError, match="has saved itself before") as caught:
        newest_complete(tmp_path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_manifest_that_is_none_is_one_sentence(tmp_path, kind):
    SPECIAL[kind](tmp_path / FILE_NAME)
    with pytest.raises((CheckpointError, OSError)) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["format", "step", "samples", "tokens", "vocab_size", "mask_id"])
def test_a_manifests_numbers_are_bounded(tmp_path, key):
    manifest().write(tmp_path)
    text = json.loads((tmp_path / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps({**text, key: 10**4000}))
    with pytest.raises(CheckpointError, match=r"is damaged|has format"):
        read_manifest(tmp_path)


def test_the_record_of_attempts_and_the_metrics_survive_what_is_none(tmp_path):
    os.mkfifo(tmp_path / "goodput.json")
    assert read_attempts(tmp_path / "goodput.json") == []
    good = json.dumps({"step": 1, "loss": 1.0}).encode()
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 0, "x": ' + DEEP + b"\n" + good + b"\n" + b'{"step": ' + DIGITS + b"}\n"
    )
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


EXTREMES = [1e300, -1e300, 1.7e308, -1.7e308, 5e-324, 1e-300, 0.0, math.inf, -math.inf]


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("one", EXTREMES)
@pytest.mark.parametrize("other", EXTREMES)
def test_an_axis_holds_any_two_numbers(one, other, is_log):
    scale = scale_of([one, other], is_log=is_log)
    if scale is None:
        assert is_log
        return
    places = [scale.at(value) for value in (one, other) if value > 0 or not is_log]
    assert all(-0.1 <= place <= 1.1 for place in places)
    assert all(math.isfinite(tick) for tick in scale.ticks())


@pytest.fixture
def run(tmp_path):
    """A run folder, of which every line may be strange."""
    return write_run(tmp_path / "run", [evaluation_line(0), training_line(1), training_line(2)])


def sentence(ended):
    """A command that fails for a user's mistake, or the odd file, and says so in a line."""
    assert "Traceback" not in ended.err, ended.err
    if ended.code == 0:
        return ""
    assert ended.code == 2, ended.err
    found = [line for line in ended.err.splitlines() if line]
    assert len(found) == 1, ended.err
    return found[0]


def test_a_report_is_written_whatever_lies_beside_the_metrics(run, tmp_path):
    tail = [
        training_line(3, loss=1e300, elbo=-1.7e308, tokens=10**30),
        evaluation_line(3, 1.7e308, eval_elbo_stderr=1e308),
    ]
    with (run / "metrics.jsonl").open("ab") as file:
        file.write("".join(json.dumps(line) + "\n" for line in tail).encode())
        file.write(b'{"step": 4, "x": ' + DEEP + b"\n" + b"x" * 2**21 + b'\n{"step": ' + DIGITS + b"}\n")
    (run / "samples").mkdir()
    (run / "status.json").write_bytes(b'{"state": "running", "reason": ' + DEEP)
    (run / "config.yaml").write_text("a: 0x" + "f" * 5000 + "\n")
    os.mkfifo(run / "log.txt")
    os.mkfifo(run / "goodput.json")
    os.mkfifo(run / "samples/step_00000001.txt")
    sparse(run / "LATEST")
    page = tmp_path / "page.html"
    assert sentence(call_forked("tools/report.py", run, "--output", page, timeout_s=50)) == ""
    text = page.read_text()
    assert "3 line(s) of metrics.jsonl are damaged and left out" in text
    assert "1e300" in text
    assert "nan" not in text.replace("nano", "")


@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a socket", "a device"])
@pytest.mark.parametrize("tool", ["tools/report.py", "tools/plot_run.py"])
def test_metrics_that_are_no_file_are_one_sentence(tmp_path, tool, kind):
    (tmp_path / "run").mkdir()
    SPECIAL[kind](tmp_path / "run/metrics.jsonl")
    assert "metrics.jsonl" in sentence(call_forked(tool, tmp_path / "run", timeout_s=50))


def test_metrics_that_are_deep_are_one_sentence_in_the_table(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "x": ' + DEEP + b"\n")
    said = sentence(call_forked("tools/plot_run.py", run, timeout_s=50))
    assert "metrics.jsonl:4: a JSON object with a step is wanted" in said


def test_a_checkpoint_with_strange_settings_is_inspected(tmp_path):
    manifest(config={"model": 3, "noise": ["x"]}).write(tmp_path)
    assert "it lists no files" in sentence(call_forked("tools/inspect_checkpoint.py", tmp_path, timeout_s=50))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('base: "a\\0b"', r"run\.yaml:1: 'a\\x00b' holds a NUL character, which no setting may; remove it"),
        ('name: "a\\0b"', r"run\.yaml:1: .* holds a NUL character"),
        ('"a\\0b": 1', r"run\.yaml:1: .* holds a NUL character"),
        ('name: "\\ud800"', r"run\.yaml:1: .* holds half of a surrogate pair"),
        ("base: " + "x" * 300, r"the base file .*xxx cannot be read \(File name too long\)"),
        ("base: " + "x/" * 3000, r"the base file .* cannot be read \(File name too long\)"),
        ("base: fifo.yaml", r"the base file .*fifo\.yaml is a FIFO, not a plain file"),
        ("base: loop.yaml", r"the base file .*loop\.yaml cannot be read \(Too many levels of symbolic links\)"),
    ],
)
def test_a_text_that_no_file_can_have_is_one_sentence(tmp_path, text, said):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(tmp_path / "run.yaml", [], RunConfig)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 8000


def test_a_name_of_300_characters_is_refused_before_a_folder_is_made(toy_corpus, tmp_path):
    tree = toy_tree(toy_corpus, tmp_path, name="n" * 300)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    said = sentence(call_forked("pretrain_dlm.py", "--config", tmp_path / "run.yaml", "--check", timeout_s=100))
    assert "name must have at most 200 bytes, got 300: 'nnn" in said


@pytest.mark.parametrize("error", [ConfigError, DataError, CheckpointError])
def test_a_message_is_printable_and_bounded_whatever_it_quotes(error):
    said = str(error(f"f: found {'x' * 10**7}\x1b[2J\u202e\ud800 here; correct it"))
    assert len(said) < 5000
    assert said.isprintable()
    assert said.startswith("f: found xxx")
    assert said.endswith("here; correct it")
    assert str(MegadiffError("one\ntwo")) == "one\ntwo"
