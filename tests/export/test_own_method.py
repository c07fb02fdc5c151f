"""Models trained by a method of the user's own, in exports, imports and where its module is gone."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from megadiff.checkpoint.folder import chosen
from megadiff.checkpoint.manifest import read_manifest
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import ConfigError
from megadiff.export.export import export
from megadiff.export.importing import import_folder
from megadiff.run.load_model import method_of

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


def test_a_method_that_is_gone_is_named(checkpoints, tmp_path):
    folder = with_section(checkpoints["tp1"], tmp_path / "step", method={"name": "method_that_is_gone.own"})
    with pytest.raises(ConfigError, match=r"the module `method_that_is_gone\.own` cannot be found"):
        method_of(read_manifest(folder), ByteTokenizer(), where=folder)


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
