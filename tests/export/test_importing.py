"""Hugging Face folders back into training checkpoints, bit for bit; what does not fit is refused by its reason."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadiff.checkpoint.folder import verify_files
from megadiff.checkpoint.safe_metadata import read_index
from megadiff.errors import CheckpointError, ConfigError
from megadiff.export.export import export
from megadiff.export.folder_files import CHECKSUMS, TRAINING
from megadiff.export.importing import import_folder
from megadiff.export.weight_files import StoredTensors, training_tensors
from megadiff.model.config import ModelConfig
from megadiff.platform.quiet import quiet
from tests.export.runs import sequences_with_prompts, trainer_logits
from tests.support.ranks import on_ranks
from tests.support.toy_model import build_on_rank

with quiet():
    from megadiff.checkpoint.load import load
    from tests.support.runs import platform_on_rank


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    return export(checkpoints["pp2_vpp2"], tmp_path_factory.mktemp("hf") / "toy").folder


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory):
    return import_folder(folder, tmp_path_factory.mktemp("imported") / "toy")


@pytest.fixture
def copy(folder, tmp_path):
    """A folder to be spoilt, without the sums that would notice."""
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / CHECKSUMS).unlink()
    return tmp_path / "copy"


def whole(folder, key):
    stored = StoredTensors(folder)
    return stored.read(key, (0,) * len(stored.shape(key)), stored.shape(key), dtype=stored.dtype(key))


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_every_weight_comes_back_bit_for_bit(checkpoints, imported):
    """The index too: the same tensors and objects of the same shapes and types, but for the optimizer's."""
    before, after = (read_index(f).state_dict_metadata for f in (checkpoints["pp2_vpp2"], imported.folder))
    assert {key for key in before if not key.startswith("optimizer.")} == set(after)
    keys = {tensor.key for tensor in training_tensors(imported.model, vocab_size=260)}
    for key in keys:
        assert before[key].properties == after[key].properties
        ours, theirs = whole(imported.folder, key), whole(checkpoints["pp2_vpp2"], key)
        alive = 260 if ours.shape[0] == 384 else None
        assert torch.equal(ours[:alive], theirs[:alive]), key
    verify_files(imported.folder, hashes=True)
    found = (imported.folder / "metadata.json").read_bytes()
    assert found == (checkpoints["pp2_vpp2"] / "metadata.json").read_bytes()


def test_exporting_what_was_imported_gives_the_same_files(folder, imported, tmp_path):
    again = export(imported.folder, tmp_path / "again").folder
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "modeling_gidd.py"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_trainer_computes_what_it_did(checkpoints, imported):
    sequences = sequences_with_prompts()
    pairs = zip(
        trainer_logits(checkpoints["pp2_vpp2"], sequences), trainer_logits(imported.folder, sequences), strict=True
    )
    assert all(torch.equal(before, after) for before, after in pairs)


def _on_two_tensor_ranks(folder, model):
    chunks, topology = build_on_rank(model, tensor=2)
    load(folder, chunks, None, topology=topology, platform=platform_on_rank())
    state = chunks[0].state_dict()
    return [state["decoder.layers.1.mlp.linear_fc2.weight"].numpy(), state["output_layer.weight"].numpy()]


def test_it_loads_on_another_layout(imported):
    parts = on_ranks(2, _on_two_tensor_ranks, imported.folder, imported.model)
    matrix, head = (torch.cat([torch.from_numpy(part[i]) for part in parts], dim=1 - i) for i in (0, 1))
    assert torch.equal(matrix, whole(imported.folder, "decoder.layers.mlp.linear_fc2.weight")[1])
    assert torch.equal(head, whole(imported.folder, "output_layer.weight"))


def test_a_folder_as_released_is_read_without_our_keys(copy, imported, tmp_path):
    """No training.json, none of our keys, bf16, several files: what the authors' own conversion leaves."""
    (copy / TRAINING).unlink()
    config = json.loads((copy / "config.json").read_text())
    for key in ("qk_norm", "noise_scale", "prompt_attention", "mask_token_id"):
        del config[key]
    (copy / "config.json").write_text(json.dumps(config))
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(copy / "model.safetensors").items()}
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"a.safetensors": names[:30], "b.safetensors": names[30:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, copy / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))

    found = import_folder(copy, tmp_path / "out", tokenizer="byte")

    assert found.model == imported.model
    assert found.manifest.config["noise"]["shift"] == 0.0
    assert found.manifest.config["conditioning"]["preset"] == "as_released"
    assert whole(found.folder, "output_layer.weight").dtype == torch.bfloat16
    assert torch.equal(whole(found.folder, "output_layer.weight")[:260], weights["lm_head.weight"])


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _without(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.bias"]
    save_file(weights, folder / "model.safetensors")


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _mapped(folder, name):
    (folder.parent / "model.safetensors").symlink_to(folder / "model.safetensors")  # there to be read, were it tried
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))


SPOILT = {
    "a missing tensor": (_without, r"model.layers.2.mlp.up_proj.bias is missing, its config.json requires \(128,\)"),
    "a cut file": (_cut, "model.safetensors is missing or damaged"),
    "no safetensors": (_pickled, "holds no safetensors weights .*other formats can run code and are not read"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "another size": (
        lambda f: edit(f / "config.json", num_hidden_layers=5),
        "=5, but the weight files beside it hold 4",
    ),
    "a gain in the weights": (lambda f: edit(f / "config.json", weight_scaling=2.0), "weight_scaling is 2.0"),
    "another width": (
        lambda f: edit(f / "config.json", intermediate_size=100),
        r"down_proj.weight has shape \(32, 128\), its config.json requires \(32, 100\)",
    ),
    "another mask": (lambda f: edit(f / "config.json", mask_token_id=9), "260 ids with the mask 9, but the tokenizer"),
    "no width": (
        lambda f: edit(f / "config.json", hidden_size=0),
        "config.json: hidden_size must be greater than 0, found 0; fetch it again",
    ),
    "rotations of a strange kind": (lambda f: edit(f / "config.json", rope_scaling="x"), "rope_scaling"),
    "a way out": (lambda f: _mapped(f, "../model.safetensors"), "which is no weight file beside it; fetch it again"),
    "no sections": (lambda f: edit(f / TRAINING, config=None), "training.json is damaged .*to use config.json alone"),
    "half a section": (
        lambda f: edit(f / TRAINING, config={"model": {"layers": None}}),
        r"training.json is damaged \(config.model.layers must be an integer, found null\); fetch it again, or move",
    ),
    "another tokenizer": (
        lambda f: edit(f / TRAINING, tokenizer_fingerprint="x"),
        "with the tokenizer 'byte' .x., which differs",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not_fit_is_refused_and_leaves_nothing(copy, tmp_path, name):
    spoil, message = SPOILT[name]
    spoil(copy)
    with pytest.raises(CheckpointError, match=message):
        import_folder(copy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if not path.is_symlink()] == ["copy"]


def test_a_flipped_bit_is_noticed_where_there_are_checksums(folder, tmp_path):
    """safetensors itself reads it without a word."""
    broken = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"its content is not what checksums\.sha256 says"):
        import_folder(broken, tmp_path / "out")


def test_an_output_that_holds_something_is_left_alone(folder, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        import_folder(folder, tmp_path)


def test_an_edited_config_wins_over_the_runs_words(copy, tmp_path):
    edit(copy / "config.json", attn_soft_cap=None)
    assert import_folder(copy, tmp_path / "out").model.softcap is None


def test_sequences_may_be_trained_at_another_length(folder, tmp_path):
    found = import_folder(folder, tmp_path / "out", seq_length=8)
    assert ModelConfig.model_validate(found.manifest.config["model"]).seq_length == 8
