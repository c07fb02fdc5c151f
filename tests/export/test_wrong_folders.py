"""A folder of one kind where another is wanted: every command says what it is and what to give."""

from __future__ import annotations

import pytest
import yaml

from megadiff.checkpoint.manifest import what_it_is
from megadiff.errors import CheckpointError
from megadiff.export.export import export
from megadiff.export.importing import import_folder
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    return export(checkpoints["tp1"], tmp_path_factory.mktemp("hf") / "a folder").folder


@pytest.fixture(scope="module")
def description(toy_corpus, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    (root / "run.yaml").write_text(yaml.safe_dump(toy_tree(toy_corpus, root)))
    return root / "run.yaml"


def refused(*command):
    ended = call_forked(*command, timeout_s=300)
    lines = [line for line in ended.err.splitlines() if line]
    assert (ended.code, len(lines)) == (2, 1), ended.err
    return lines[0]


@pytest.mark.parametrize("check", [["--check"], []])
def test_starting_a_run_from_a_hugging_face_folder_suggests_importing_it(folder, description, check):
    said = refused("pretrain_dlm.py", "--config", description, f"checkpoint.start_from={folder}", *check)
    assert f"{folder} is a Hugging Face folder, not a checkpoint to train from" in said
    assert f"run `megadiff convert_checkpoint import --input '{folder}' --output NEW_FOLDER`" in said


def test_the_command_it_names_makes_a_folder_to_start_from(folder, description, tmp_path):
    out = tmp_path / "imported"
    assert call_forked("tools/convert_checkpoint.py", "import", "--input", folder, "--output", out).code == 0
    block = {"qk_norm": "full", "sink": True, "softcap": 5.0, "mlp_bias": True}
    scales = {"resid_scale": "completep", "head_scale": "completep"}
    changes = [f"model.{key}={str(value).lower()}" for key, value in {**block, **scales}.items()]
    start = f"checkpoint.start_from={out}"
    ended = call_forked("pretrain_dlm.py", "--config", description, "--check", start, *changes)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("tools/convert_checkpoint.py", ["export", "--output", "no", "--checkpoint"]),
        ("tools/inspect_checkpoint.py", []),
    ],
)
def test_tools_that_want_a_checkpoint_say_so(folder, tool, words):
    assert "is a Hugging Face folder, not a checkpoint to train from" in refused(tool, *words, folder)


def test_models_of_other_kinds_are_named(toy_corpus, checkpoints, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    wrong = {
        str(toy_corpus): "the prefix of indexed data",
        tmp_path / "file": "a file",
        tmp_path / "empty": "no complete checkpoint in it",
        "x" * 5000: "no such folder",
    }
    for path, kind in wrong.items():
        said = refused("tools/evaluate.py", "elbo", "--model", path, "--data", "x")
        assert f"{kind}; give a run folder (such as runs/NAME) or one of its checkpoints/step_* folders" in said


def test_an_import_says_what_it_was_given(toy_corpus, checkpoints, tmp_path):
    run = checkpoints["tp1"].parent.parent
    (tmp_path / "file").write_text("x")
    wrong = {
        run: "it is a run folder",
        checkpoints["tp1"]: "it is a training checkpoint",
        checkpoints["tp1"].parent: "it is a folder of checkpoints",
        toy_corpus: "is the prefix of indexed data",
        tmp_path / "file": "is a file",
        tmp_path / "gone": "is no such folder",
    }
    for path, kind in wrong.items():
        with pytest.raises(CheckpointError, match=kind):
            import_folder(path, tmp_path / "out")
    (tmp_path / "link").symlink_to("nowhere")
    assert what_it_is(tmp_path / "link") == "a link that leads nowhere"
    assert what_it_is(tmp_path) == "another folder"
