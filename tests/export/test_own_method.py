"""Models trained by a method of the user's own, in exports, imports and where its module is gone."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from megadiff.checkpoint.folder import chosen
from megadiff.checkpoint.manifest import read_manifest
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import ConfigError, MegadiffError
from megadiff.export.export import export
from megadiff.export.importing import import_folder
from megadiff.run.load_model import load_model
from megadiff.run.recorded_parts import method_of

UNEXPORTABLE = """
from megadiff.errors import ConfigError
from megadiff.methods.gidd import Gidd


class Own(Gidd):
    def export_config(self):
        raise ConfigError("models of this method stay here")


def build(settings, context):
    return Own(context)
"""


@pytest.fixture
def own_method(tmp_path, monkeypatch):
    """Name of a method outside the package whose models cannot be exported."""
    (tmp_path / "method_for_export_tests").mkdir()
    (tmp_path / "method_for_export_tests/own.py").write_text(UNEXPORTABLE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "method_for_export_tests.own"
    for name in ("method_for_export_tests", "method_for_export_tests.own"):
        sys.modules.pop(name, None)


def with_section(checkpoint, folder, **sections):
    """Copy a checkpoint whose configuration has these sections."""
    copy = shutil.copytree(chosen(checkpoint), folder)
    saved = read_manifest(copy)
    saved.model_copy(update={"config": {**saved.config, **sections}}).write(copy)
    return copy


def test_an_export_is_refused_before_the_weights_are_read(checkpoints, own_method, tmp_path):
    folder, read = with_section(checkpoints["tp1"], tmp_path / "step", method={"name": own_method}), []
    with pytest.raises(ConfigError, match="models of this method stay here"):
        export(folder, tmp_path / "out", on_tensor=read.append)
    assert read == []
    assert not (tmp_path / "out").exists()


GONE = {
    "method": ("method.name", {"name": "part_that_is_gone.own"}),
    "noise": ("noise.process", {"process": "part_that_is_gone.own", "steepness": 0.4}),
    "data": ("data.tokenizer", {"tokenizer": "part_that_is_gone.own:words.txt"}),
}


@pytest.mark.parametrize("section", GONE)
def test_a_module_that_is_gone_is_named_with_its_key(section, checkpoints, tmp_path):
    """Evaluation, sampling and export find it missing where training would."""
    key, content = GONE[section]
    folder = with_section(checkpoints["tp1"], tmp_path / "step", **{section: content})
    said = (
        rf"^{folder}/manifest\.json: `{key}`: the module `part_that_is_gone\.own` cannot be found: no package "
        r"`part_that_is_gone` is installed or on PYTHONPATH; add the folder that holds `part_that_is_gone`, as in "
        r"`export PYTHONPATH=FOLDER`$"
    )
    with pytest.raises(MegadiffError, match=said), load_model(folder, platform="cpu"):
        pass
    with pytest.raises(MegadiffError, match=said):
        export(folder, tmp_path / "out")


def test_a_tokenizer_that_was_moved_can_be_given(checkpoints, tmp_path):
    folder = with_section(checkpoints["tp1"], tmp_path / "step", data={"tokenizer": "moved/tokenizer.json"})
    said = r"manifest\.json: `data\.tokenizer`: moved/tokenizer\.json: .*; --tokenizer gives the path"
    with pytest.raises(MegadiffError, match=said), load_model(folder, platform="cpu"):
        pass
    with pytest.raises(MegadiffError, match=r"^elsewhere: wanted "):
        export(folder, tmp_path / "out", tokenizer="elsewhere")
    assert export(folder, tmp_path / "out", tokenizer="byte").tensors > 0


def test_a_weighting_that_is_gone_is_not_needed(checkpoints, tmp_path):
    folder = with_section(
        checkpoints["tp1"], tmp_path / "step", objective={"weighting": "weighting_that_is_gone.own", "cap": 0.5}
    )
    assert method_of(read_manifest(folder), ByteTokenizer(), where=folder).export_config()["is_causal"] is False


def test_an_import_loads_no_module_of_the_folder_s_choice(checkpoints, tmp_path, monkeypatch):
    folder = export(checkpoints["tp1"], tmp_path / "hf").folder
    (folder / "checksums.sha256").unlink()
    description = json.loads((folder / "training.json").read_text())
    description["config"]["method"] = {"name": "hostile_method.module", "setting": 1}
    (folder / "training.json").write_text(json.dumps(description))
    (tmp_path / "hostile_method").mkdir()
    (tmp_path / "hostile_method/module.py").write_text("raise SystemExit('it ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    imported = import_folder(folder, tmp_path / "in")
    assert imported.manifest.config["method"] == {"name": "gidd"}
    assert "hostile_method" not in sys.modules
