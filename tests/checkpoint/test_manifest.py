from __future__ import annotations

import errno
import os
import re

import pytest

from megadiff.checkpoint import manifest as manifests
from megadiff.checkpoint.manifest import FORMAT, Manifest, check_same_run, no_checkpoint, read_manifest
from megadiff.errors import CheckpointError, ConfigError, StorageError

CONFIG = {
    "seed": 0,
    "model": {"layers": 2, "hidden": 32},
    "noise": {"shift": "balanced"},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "parallel": {"tensor": 2, "distributed_optimizer": False},
    "precision": {"compute": "fp32"},
}


def manifest(**changes):
    facts = {
        "format": FORMAT,
        "step": 4,
        "samples": 32,
        "tokens": 512,
        "config": CONFIG,
        "vocab_size": 260,
        "mask_id": 3,
        "tokenizer_fingerprint": "t",
        "data_fingerprint": "d",
        "layout": {"tensor": 2},
        "versions": {"torch": "2.13.0"},
    }
    return Manifest(**{**facts, **changes})


def test_what_is_written_is_read_back(tmp_path):
    manifest(files={"a.distcp": {"bytes": 3, "sha256": "00"}}).write(tmp_path)
    assert read_manifest(tmp_path) == manifest(files={"a.distcp": {"bytes": 3, "sha256": "00"}})


def test_a_folder_without_one_is_no_checkpoint(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"is not a complete checkpoint: it has no manifest\.json; give a step_\*"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff\xfe", b"null"])
def test_a_damaged_one_is_said_in_a_line(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged \(.*\); take another checkpoint of the run$"):
        read_manifest(tmp_path)


def test_a_missing_step_is_answered_with_the_nearest_one(tmp_path):
    (tmp_path / "step_00000400").mkdir()
    for name, hint in (("step_00000500", f"; did you mean {tmp_path}/step_00000400?"), ("best", "")):
        wanted = f"{tmp_path}/{name}: there is no such folder{hint}; give a step_* folder written by a run"
        assert no_checkpoint(tmp_path / name) == wanted


def test_a_format_of_the_future_is_refused(tmp_path):
    manifest(format=FORMAT + 1).write(tmp_path)
    with pytest.raises(CheckpointError, match=rf"has format {FORMAT + 1}, this version reads {FORMAT}"):
        read_manifest(tmp_path)


def test_every_difference_that_matters_is_listed(tmp_path):
    other = {
        **CONFIG,
        "seed": 1,
        "model": {"layers": 4, "hidden": 32, "sink": True},
        "batch": {"global_batch_size": 16, "micro_batch_size": 2},
    }
    with pytest.raises(CheckpointError) as caught:
        check_same_run(manifest(), manifest(config=other, data_fingerprint="e"), tmp_path)
    text = str(caught.value)
    assert (
        "batch.global_batch_size: 8 -> 16; model.layers: 2 -> 4; model.sink: null -> true; seed: 0 -> 1; "
        'data_fingerprint: "d" -> "e" (the contents of data.train, or the end '
        "by which budgets are spent). Give the run another `name`"
    ) in text


def test_packing_and_padding_are_named_where_the_data_differ(tmp_path):
    before = manifest(config={**CONFIG, "data": {"padding": "predicted_eos", "packing": False}})
    after = {**CONFIG, "data": {"padding": "eos", "packing": True}}
    with pytest.raises(CheckpointError) as caught:
        check_same_run(before, manifest(config=after, data_fingerprint="e"), tmp_path)
    assert (
        'data_fingerprint: "d" -> "e" (data.packing: false -> true, data.padding: "predicted_eos" -> "eos", the '
        "contents of data.train, or the end by which budgets are spent)"
    ) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"parallel": {"tensor": 1, "distributed_optimizer": False}},
        {"optimizer": {"name": "adamw", "lr": 5e-4}},
        {"batch": {"global_batch_size": 8, "micro_batch_size": 4}},
    ],
)
def test_layout_rate_and_microbatch_may_change(tmp_path, change):
    check_same_run(manifest(), manifest(config={**CONFIG, **change}), tmp_path)


@pytest.mark.parametrize(
    "key", ["batch.micro_batch_size", "parallel.tensor", "optimizer.lr", "log", "seed", "noise.shift"]
)
def test_a_key_that_may_change_is_accepted_whether_or_not_it_is_allowed(tmp_path, key):
    other = {**CONFIG, "batch": {"global_batch_size": 8, "micro_batch_size": 4}}
    changes = check_same_run(manifest(), manifest(config=other), tmp_path, allowed=[key])
    assert [change.key for change in changes] == ["batch.micro_batch_size"]


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("model.layers", "model.layers: this cannot"),
        ("batch.global_batch_size", "batch.global_batch_size: this cannot"),
        ("batch", "batch: batch.global_batch_size, batch.rampup in it cannot"),
        ("optimizer", "optimizer: optimizer.name, optimizer.parametrisation in it cannot"),
    ],
)
def test_a_key_that_cannot_change_is_refused_and_so_is_its_section(tmp_path, key, named):
    with pytest.raises(ConfigError) as refused:
        check_same_run(manifest(), manifest(), tmp_path, allowed=["seed", key])
    assert str(refused.value).startswith(f"--allow-change {named} change inside a run; --allow-change is for seed")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_disk_that_refuses_to_read_one_is_named(tmp_path, monkeypatch, name):
    manifest(files={"a.distcp": {"bytes": 3, "sha256": "00"}}).write(tmp_path)
    read = manifests.read_bytes

    def failing(path, *, max_bytes):
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, max_bytes=max_bytes)

    monkeypatch.setattr(manifests, "read_bytes", failing)
    with pytest.raises(StorageError, match=rf"{name} cannot be read \(Input/output error\); check the disk"):
        read_manifest(tmp_path)


def test_another_training_method_is_another_run(tmp_path):
    saved = manifest(config={**CONFIG, "method": {"name": "gidd"}})
    wanted = manifest(config={**CONFIG, "method": {"name": "next_token"}})
    with pytest.raises(CheckpointError, match=r'method\.name: "gidd" -> "next_token"'):
        check_same_run(saved, wanted, tmp_path)
    changes = check_same_run(saved, wanted, tmp_path, allowed=["method"])
    assert [change.key for change in changes] == ["method.name"]


def test_sources_that_changed_are_named_instead_of_a_fingerprint(tmp_path):
    before = {**CONFIG, "data": {"train": ["a"]}}
    now = {**before, "data": {"train": ["a", "b"]}}
    with pytest.raises(CheckpointError) as caught:
        check_same_run(manifest(config=before), manifest(config=now, data_fingerprint="e"), tmp_path)
    assert 'data.train: ["a"] -> ["a", "b"]. Give the run' in str(caught.value)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"seed": 8}, "Set checkpoint.weights_only=true to take its weights alone, or give this run the settings"),
        ({"model": {**CONFIG["model"], "layers": 7}}, "Give this run the settings it was started with"),
    ],
)
def test_a_checkpoint_to_start_from_may_give_its_weights_alone(change, advice, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(f". {advice}")):
        check_same_run(manifest(), manifest(config={**CONFIG, **change}), tmp_path, is_own=False)
