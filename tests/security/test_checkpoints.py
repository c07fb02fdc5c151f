"""A hostile checkpoint in a run folder, met by the real commands: nothing of it runs, and what is said is a sentence.

Whoever can write the folder can also write its manifest, so every hostile file here is listed with its right checksum.
"""

from __future__ import annotations

import json
import os
import shutil

import pytest

from megadiff.checkpoint.folder import entry_of
from megadiff.checkpoint.manifest import read_manifest
from tests.security.places import pickled, torch_saved
from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree

STEP = "checkpoints/step_00000002"


@pytest.fixture(scope="module")
def trained(toy_corpus, tmp_path_factory):
    """A run of two steps with a checkpoint, made by the command."""
    folder = tmp_path_factory.mktemp("trained")
    tree = toy_tree(toy_corpus, folder, model__layers=1, data__valid=[], schedule__steps=2, schedule__warmup_steps=1)
    ended = call_forked("pretrain_dlm.py", "--config", write_yaml(folder / "run.yaml", tree))
    assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of its own: (description, run folder)."""
    shutil.copytree(trained / "toy", tmp_path / "toy")
    text = (trained / "run.yaml").read_text().replace(str(trained), str(tmp_path))
    (tmp_path / "run.yaml").write_text(text)
    return tmp_path / "run.yaml", tmp_path / "toy"


def relist(folder, *names):
    """Make the manifest and its checksum agree with what was put there."""
    manifest = read_manifest(folder)
    files = {**manifest.files, **{name: entry_of(folder / name) for name in names}}
    manifest.model_copy(update={"files": files}).write(folder)


def refused(ended, canary):
    """The one sentence of a command that ended as it should."""
    assert not canary.exists()
    assert ended.code == 2, ended.out + ended.err
    lines = [line for line in ended.err.splitlines() if line]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    return lines[0]


def commands(description, folder):
    """Every command that loads a checkpoint."""
    return {
        "pretrain": ("pretrain_dlm.py", "--config", description, "--strict-resume", "schedule.steps=3"),
        "evaluate": ("tools/evaluate.py", "elbo", "--model", folder / STEP, "--data", "nowhere"),
        "generate": ("tools/generate.py", "--model", folder / STEP, "--prompt", "a"),
    }


@pytest.mark.parametrize("env", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}], ids=["plain", "torch unguarded"])
@pytest.mark.parametrize("command", ["pretrain", "evaluate", "generate"])
def test_a_hostile_common_file_runs_nothing(run, tmp_path, command, env):
    """Torch's own switch, set in a user's shell for another program, must not open the door here."""
    description, folder = run
    canary = tmp_path / "canary"
    (folder / STEP / "common.pt").write_bytes(torch_saved(f"touch {canary}"))
    relist(folder / STEP, "common.pt")
    said = refused(call_forked(*commands(description, folder)[command], env=env), canary)
    assert "posix.system" in said


@pytest.mark.parametrize("command", ["pretrain", "evaluate", "generate"])
def test_a_hostile_index_runs_nothing_in_any_command(run, tmp_path, command):
    description, folder = run
    canary = tmp_path / "canary"
    (folder / STEP / ".metadata").write_bytes(pickled(f"touch {canary}"))
    relist(folder / STEP, ".metadata")
    said = refused(call_forked(*commands(description, folder)[command]), canary)
    assert "is not a checkpoint index and was not loaded: it names posix.system" in said


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b'{"sharded_backend": "zarr", "sharded_backend_version": 1}',
        b'{"a": ' * 5000,
    ],
)
def test_the_librarys_format_description_cannot_choose_another_reader(run, tmp_path, content):
    description, folder = run
    (folder / STEP / "metadata.json").write_bytes(content)
    relist(folder / STEP, "metadata.json")
    refused(call_forked(*commands(description, folder)["pretrain"]), tmp_path / "canary")


def test_a_pickle_as_manifest_runs_nothing(run, tmp_path):
    description, folder = run
    canary = tmp_path / "canary"
    (folder / STEP / "manifest.json").write_bytes(pickled(f"touch {canary}"))
    refused(call_forked(*commands(description, folder)["evaluate"]), canary)


def test_a_file_the_manifest_does_not_list_is_named(run, tmp_path):
    """Nothing may bring a file in beside those that were written: a library could look for it by name."""
    description, folder = run
    canary = tmp_path / "canary"
    (folder / STEP / "model_state.pt").write_bytes(torch_saved(f"touch {canary}"))
    said = refused(call_forked(*commands(description, folder)["evaluate"]), canary)
    assert "model_state.pt" in said


@pytest.mark.parametrize("where", ["../outside", "/etc/hostname"])
def test_a_manifest_with_an_outside_path_is_refused_naming_the_path(run, tmp_path, where):
    description, folder = run
    (folder / "checkpoints/outside").write_bytes(b"abc")
    manifest = read_manifest(folder / STEP)
    entry = entry_of(folder / STEP / "common.pt")
    manifest.model_copy(update={"files": {**manifest.files, where: entry}}).write(folder / STEP)
    assert where in refused(call_forked(*commands(description, folder)["evaluate"]), tmp_path / "canary")


def test_a_shard_that_is_a_link_to_the_same_bytes_elsewhere_is_refused(run, tmp_path):
    """Its content could be another one's by the time it is read again."""
    description, folder = run
    (folder / STEP / "common.pt").rename(tmp_path / "elsewhere")
    (folder / STEP / "common.pt").symlink_to(tmp_path / "elsewhere")
    assert "common.pt" in refused(call_forked(*commands(description, folder)["evaluate"]), tmp_path / "canary")


@pytest.mark.parametrize(
    "change",
    [{"config": {}}, {"config": {"model": 3}}, {"vocab_size": -1}, {"mask_id": 10**9}],
)
def test_a_manifest_whose_settings_make_no_sense_is_a_sentence(run, tmp_path, change):
    description, folder = run
    read_manifest(folder / STEP).model_copy(update=change).write(folder / STEP)
    refused(call_forked(*commands(description, folder)["evaluate"]), tmp_path / "canary")


def test_a_hostile_saved_description_runs_nothing(run, tmp_path):
    _, folder = run
    canary = tmp_path / "canary"
    (folder / "config.yaml").write_text(f"note: !!python/object/apply:os.system [{json.dumps(f'touch {canary}')}]\n")
    said = refused(call_forked("tools/replay.py", "--run", folder, "--step", "1"), canary)
    assert "the tag `!!python/object/apply:os.system` is not allowed" in said


@pytest.mark.parametrize("hint", ["../../../etc", "step_00000002/../../outside", "\x00", "x" * 10_000, "step_99999999"])
def test_a_hostile_hint_leads_nowhere_else(run, hint, monkeypatch):
    """`LATEST` is written for people; whatever it says, the run goes on from its own newest checkpoint."""
    description, folder = run
    (folder / "LATEST").write_text(hint)
    ended = call_forked("pretrain_dlm.py", "--config", description, "schedule.steps=3", timeout_s=300)
    assert ended.code == 0, ended.err
    assert f"{STEP} after step 2" in ended.out


def test_linked_data_are_read_and_a_folder_in_their_place_is_named(toy_corpus, tmp_path):
    """Links to data are how large corpora are shared; what is no regular file is refused."""
    for suffix in (".idx", ".bin", ".json"):
        os.symlink(f"{toy_corpus}{suffix}", tmp_path / f"link{suffix}")
    assert call_forked("tools/check_data.py", tmp_path / "link").code == 0
    (tmp_path / "link.bin").unlink()
    os.mkfifo(tmp_path / "link.bin")
    ended = call_forked("tools/check_data.py", tmp_path / "link", timeout_s=100)
    assert ended.code == 2
    assert "link.bin" in ended.out
