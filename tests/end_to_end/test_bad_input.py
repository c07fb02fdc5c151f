"""A user's mistake ends with exit code 2 and one sentence of cause and remedy, and nothing is written."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megadiff.data.tokenizers import load_tokenizer
from tests.end_to_end.bad_inputs import CHECKPOINTS, CONTINUED, DATA, DESCRIPTIONS, FILES, NATURAL, TOOLS
from tests.support.commands import call, write_yaml
from tests.support.forked_command import Ended, call_forked
from tests.support.permissions import heed_permissions
from tests.support.runs import toy_tree

PRETRAIN, GENERATE = "pretrain_dlm.py", "tools/generate.py"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The tables hold on a machine with GPUs too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def description(toy_corpus, tmp_path):
    return write_yaml(tmp_path / "run.yaml", toy_tree(toy_corpus, tmp_path / "runs"))


def assert_refused(ended: Ended, sentence: str) -> None:
    """One line, ours, that matches; argparse's own complaints put the usage before theirs."""
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.out + ended.err
    lines = ended.err.strip().splitlines()
    if not ended.err.startswith("usage: "):
        assert len(lines) == 1, ended.err
        assert lines[0].startswith("error: ")
    assert [line for line in lines if "error: " in line] == lines[-1:]
    assert re.search(sentence, ended.err), ended.err


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything below a folder."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.mark.parametrize(
    ("overrides", "ranks", "sentence"), DESCRIPTIONS, ids=[sequence[0] for sequence in DESCRIPTIONS]
)
def test_a_description_that_cannot_be_is_refused_in_a_sentence(description, tmp_path, overrides, ranks, sentence):
    before = contents(tmp_path)
    words = overrides.split() if "{" not in overrides else [overrides]
    assert_refused(call_forked(PRETRAIN, "--config", description, *words, env={"WORLD_SIZE": str(ranks)}), sentence)
    if not overrides.startswith("checkpoint."):  # asked on every rank, once there is a log
        assert contents(tmp_path) == before
    assert not list(tmp_path.glob("runs/*/c*"))  # neither config.yaml nor checkpoints


@pytest.mark.parametrize(
    ("content", "sentence"), [sequence[1:] for sequence in FILES], ids=[sequence[0] for sequence in FILES]
)
def test_a_file_that_is_no_description_is_refused(tmp_path, content, sentence):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content) if content is not None else path.mkdir()
    before = contents(tmp_path)
    assert_refused(call_forked(PRETRAIN, "--config", path), sentence)
    assert contents(tmp_path) == before


def test_every_mistake_of_a_description_has_its_own_line(tmp_path):
    write_yaml(tmp_path / "bad.yaml", {"name": "a", "model": {"layers": 2}, "sead": 1})
    code, _, err = call_forked(PRETRAIN, "--config", tmp_path / "bad.yaml")
    assert code == 2
    for line in (
        "unknown key `sead`; did you mean `seed`?",
        "missing required key `model.heads`, which wants an integer",
    ):
        assert line in err
    assert all(line.count(f"{tmp_path}/bad.yaml") == 1 for line in err.splitlines())


@pytest.mark.parametrize(
    ("damage", "sentence"), [sequence[1:] for sequence in DATA], ids=[sequence[0] for sequence in DATA]
)
def test_damaged_data_are_refused_with_their_key_and_file(description, toy_corpus, tmp_path, damage, sentence):
    for end in (".bin", ".idx", ".json"):
        shutil.copy(f"{toy_corpus}{end}", tmp_path / f"copy{end}")
    damage(tmp_path / "copy")
    before = contents(tmp_path)
    ended = call_forked(PRETRAIN, "--config", description, f"data.train=[{tmp_path}/copy]")
    assert_refused(ended, rf"^error: data\.train\[0\]: .*{sentence}")
    assert contents(tmp_path) == before


@pytest.fixture
def word_tokenizer(tmp_path):
    Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_data_of_another_tokenizer_are_refused(description, word_tokenizer):
    ended = call_forked(PRETRAIN, "--config", description, f"data.tokenizer={word_tokenizer}")
    assert_refused(
        ended, r"wrong vocabulary for the data: made with tokenizer byte .*; set data\.tokenizer to the first or"
    )


def test_a_damaged_tokenizer_is_refused(description, word_tokenizer):
    word_tokenizer.write_bytes(word_tokenizer.read_bytes()[:100])
    ended = call_forked(PRETRAIN, "--config", description, f"data.tokenizer={word_tokenizer}")
    assert_refused(
        ended, r"data\.tokenizer: .*tokenizer\.json: not a whole tokenizer\.json .*; train or fetch it again"
    )


def test_a_tokenizer_without_a_mask_gets_an_id_no_text_has(word_tokenizer):
    tokenizer = load_tokenizer(str(word_tokenizer))
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (51, 50)


def test_a_folder_that_may_not_be_written_is_refused(description, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    ended = call_forked(PRETRAIN, "--config", description, before=heed_permissions)
    assert_refused(
        ended, r"the run folder .*/runs/toy cannot be written \(Permission denied\); set output_dir to a folder"
    )
    assert os.listdir(tmp_path / "runs") == []


@pytest.fixture(scope="module")
def finished_run(toy_corpus, tmp_path_factory):
    """A run of 4 steps with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    changes = {"schedule__steps": 4, "schedule__warmup_steps": 0, "checkpoint__every": 2, "data__valid": []}
    file = write_yaml(folder / "run.yaml", toy_tree(toy_corpus, folder, **changes))
    ended = call_forked(PRETRAIN, "--config", file)
    assert ended.code == 0, ended.err
    return folder / "toy"


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of it, and its description."""
    shutil.copytree(finished_run, tmp_path / "toy")
    text = (finished_run.parent / "run.yaml").read_text().replace(str(finished_run.parent), str(tmp_path))
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path / "toy"


@pytest.mark.parametrize(("overrides", "sentence"), CONTINUED, ids=[sequence[0] for sequence in CONTINUED])
def test_a_run_that_cannot_go_on_is_refused_and_its_checkpoints_stay(run, overrides, sentence):
    before = contents(run / "checkpoints"), (run / "config.yaml").read_text(), (run / "metrics.jsonl").read_text()
    words = overrides.format(run=run).split()
    assert_refused(call_forked(PRETRAIN, "--config", run.parent / "run.yaml", *words), sentence)
    assert before == (
        contents(run / "checkpoints"),
        (run / "config.yaml").read_text(),
        (run / "metrics.jsonl").read_text(),
    )


@pytest.mark.parametrize(
    ("damage", "sentence"), [sequence[1:] for sequence in CHECKPOINTS], ids=[sequence[0] for sequence in CHECKPOINTS]
)
def test_a_damaged_checkpoint_is_refused_by_those_who_read_it(run, damage, sentence):
    step = run / "checkpoints/step_00000004"
    damage(step)
    before = contents(step)
    assert_refused(call_forked(GENERATE, "--model", step, "--num-tokens", "2", "--steps", "2"), sentence)
    assert contents(step) == before


def test_a_run_with_only_damaged_checkpoints_does_not_restart_unasked(run):
    for step in (run / "checkpoints").iterdir():
        os.truncate(step / "manifest.json", 100)
    ended = call_forked(PRETRAIN, "--config", run.parent / "run.yaml")
    assert_refused(ended, r"2 checkpoint\(s\) and all are damaged .*; move them away .*, or give it another `name`")


@pytest.mark.parametrize(("command", "sentence"), TOOLS, ids=[sequence[0].replace("tools/", "") for sequence in TOOLS])
def test_a_misused_tool_says_what_it_wants(finished_run, toy_corpus, tmp_path, command, sentence):
    for name, text in {
        "a.txt": "hello world\n" * 20,
        "a.doc": "hello",
        "a.jsonl.gz": "not compressed",
        "key.jsonl": '{"body": "a"}\n',
        "number.jsonl": '{"text": "a"}\n{"text": 3}\n',
    }.items():
        (tmp_path / name).write_text(text)
    places = (tmp_path, finished_run, toy_corpus.parent)
    before = [contents(place) for place in places]
    assert_refused(call_forked(*command.format(run=finished_run, data=toy_corpus, tmp=tmp_path).split()), sentence)
    assert [contents(place) for place in places] == before


@pytest.mark.parametrize(("command", "named"), NATURAL, ids=[sequence[0].replace("tools/", "") for sequence in NATURAL])
def test_a_natural_mistake_gets_a_sentence_that_names_what_was_typed(
    finished_run, toy_corpus, word_tokenizer, tmp_path, command, named
):
    """One line, in the command's own words: no key of a run description where none was given, no long fingerprints."""
    word_tokenizer.rename(tmp_path / "words.json")
    (tmp_path / "a.txt").write_text("hello world\n" * 20)
    (tmp_path / "key.jsonl").write_text('{"body": "a"}\n')
    description = write_yaml(tmp_path / "run.yaml", toy_tree(toy_corpus, tmp_path / "runs"))
    places = {"tmp": tmp_path, "run": finished_run, "data": toy_corpus, "yaml": description}
    before = [contents(place) for place in (tmp_path, finished_run, toy_corpus.parent)]
    ended = call_forked(*command.format(**places).split())
    pattern = ".*".join(re.escape(part.format(**places)) for part in named.split(".*"))
    assert_refused(ended, pattern)
    assert not ended.err.startswith("usage: ")
    assert not re.search(r"[0-9a-f]{16}", ended.err)
    if command.startswith("tools/") and "doctor" not in command:
        assert not re.search(r"\bdata\.(train|valid|tokenizer)|model\.seq_length|platform=", ended.err)
    assert before == [contents(place) for place in (tmp_path, finished_run, toy_corpus.parent)]


@pytest.mark.end_to_end
def test_the_command_itself_ends_with_2_and_no_trace(description):
    code, out, err = call("pretrain_dlm.py", "--config", description, "optimizer.lr=fast")
    assert (code, out) == (2, "")
    assert err.startswith("error: command line: ")
    assert len(err.splitlines()) == 1


@pytest.mark.end_to_end
def test_the_command_says_what_it_would_do_and_exits_with_0(description):
    code, out, err = call_forked(
        "pretrain_dlm.py", "--config", description, "--check", "--ranks", "4", "parallel.tensor=2"
    )
    assert code == 0, err
    assert "layout            4 rank(s): tensor 2 x pipeline 1 x data 2" in out
    assert "tokens per step   128 (8 sequences of 16, 2 microbatch(es) of 2 per replica)" in out
    assert re.search(
        r"^learning rate     block matrices, 49,152 parameters: peak 0\.002 \(optimizer\.lr\), ", out, re.M
    )
    assert re.search(
        r"^baselines         unigram \d\.\d+ nats per token \(.* bits per byte\) of 6,\d+ validation", out, re.M
    )
