"""The list of checksums: every listed file is compared, what is read must be listed, and links stay inside."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from megadiff.errors import CheckpointError
from megadiff.export.export import export
from megadiff.export.folder_files import CHECKSUMS
from megadiff.export.importing import import_folder
from tests.export.hostile_folders import edit, relist
from tests.support.forked_command import call_forked


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    return export(checkpoints["tp1"], tmp_path_factory.mktemp("hf") / "toy").folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def listed(folder):
    return [line.split("  ")[1] for line in (folder / CHECKSUMS).read_text().splitlines()]


def test_a_change_of_any_listed_file_is_found(folder, tmp_path):
    names = listed(folder)
    assert {"training.json", "config.json", "tokenizer.json", "README.md", "modeling_gidd.py"} < set(names)
    for name in names:
        changed = shutil.copytree(folder, tmp_path / name)
        with (changed / name).open("ab") as file:
            file.write(b"\n")
        with pytest.raises(
            CheckpointError, match=rf"{name} is damaged or was changed: .*|{name} is missing or damaged"
        ):
            import_folder(changed, tmp_path / "out")


def test_other_noise_in_the_runs_description_is_not_taken_on_trust(copy, tmp_path):
    content = json.loads((copy / "training.json").read_text())
    content["config"]["noise"]["shift"] = "masked"
    (copy / "training.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"training\.json is damaged or was changed"):
        import_folder(copy, tmp_path / "out")
    relist(copy)  # meant, and the configuration, which says otherwise, wins
    assert import_folder(copy, tmp_path / "out").manifest.config["noise"]["shift"] == 0.0


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "training.json", "tokenizer.json"])
def test_what_is_read_must_be_listed(copy, tmp_path, name):
    lines = (copy / CHECKSUMS).read_text().splitlines(keepends=True)
    (copy / CHECKSUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    with pytest.raises(CheckpointError, match=rf"{name} is not listed in checksums\.sha256"):
        import_folder(copy, tmp_path / "out")


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "other.model"])
def test_a_file_that_would_be_read_may_not_come_in_beside(copy, tmp_path, name):
    (copy / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=rf"{name} is not listed in checksums\.sha256"):
        import_folder(copy, tmp_path / "out")


def test_what_is_not_read_may_lie_beside(copy, tmp_path):
    (copy / ".gitattributes").write_text("x")
    (copy / ".cache").mkdir()
    assert import_folder(copy, tmp_path / "out").is_checked


@pytest.mark.parametrize(
    "write",
    [
        lambda digest, name: f"{digest} *{name}\n",
        lambda digest, name: f"{digest.upper()}  ./{name}\r\n",
        lambda digest, name: f"\n{digest}  {name}\n\n",
    ],
)
def test_the_forms_that_sha256sum_writes_are_read(copy, tmp_path, write):
    pairs = [line.split("  ") for line in (copy / CHECKSUMS).read_text().splitlines()]
    (copy / CHECKSUMS).write_text("".join(write(*pair) for pair in pairs))
    assert import_folder(copy, tmp_path / "out").is_checked


@pytest.mark.parametrize(
    "line", ["x  config.json", f"{'0' * 63}  config.json", f"{'0' * 64}", f"SHA256 (config.json) = {'0' * 64}"]
)
def test_a_line_that_is_none_is_named(copy, tmp_path, line):
    with (copy / CHECKSUMS).open("a") as file:
        file.write(line + "\n")
    count = len(listed(copy)) if "  " in line else len((copy / CHECKSUMS).read_text().splitlines())
    with pytest.raises(CheckpointError, match=rf"checksums\.sha256:{count} is not a line of sha256sum"):
        import_folder(copy, tmp_path / "out")


@pytest.mark.parametrize("name", ["../training.json", "/etc/passwd", "a/b", "..", "x" * 300])
def test_a_name_that_leads_out_is_refused(copy, tmp_path, name):
    with (copy / CHECKSUMS).open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="no file of the folder"):
        import_folder(copy, tmp_path / "out")


def test_two_sums_of_one_file_must_both_be_right(copy, tmp_path):
    with (copy / CHECKSUMS).open("a") as file:
        file.write(f"{'0' * 64}  config.json\n")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged or was changed"):
        import_folder(copy, tmp_path / "out")


def test_the_hubs_cache_of_links_is_read(folder, tmp_path):
    """`snapshots/REVISION/NAME -> ../../blobs/HASH`, as huggingface_hub lays it out."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        shutil.copy(path, blobs / f"{path.name}-hash")
        os.symlink(f"../../blobs/{path.name}-hash", snapshot / path.name)
    assert import_folder(snapshot, tmp_path / "out").is_checked
    (snapshot / "config.json").unlink()
    os.symlink("../../../config.json", snapshot / "config.json")
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is a link that leads out of the folder"):
        import_folder(snapshot, tmp_path / "out2")


def test_a_folder_without_sums_is_imported_and_that_is_reported(copy, tmp_path):
    (copy / CHECKSUMS).unlink()
    edit(copy / "config.json", noise_type=2.0)
    ended = call_forked("tools/convert_checkpoint.py", "import", "--input", copy, "--output", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "has no checksums.sha256, so its files were taken as they are" in ended.out
