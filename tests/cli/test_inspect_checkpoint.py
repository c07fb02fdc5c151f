"""The tool's words about a whole, a damaged and a missing checkpoint."""

from __future__ import annotations

import json

import pytest

from tests.support.commands import call
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank


@pytest.fixture(scope="module")
def run(toy_corpus, tmp_path_factory):
    config = toy_config(
        toy_corpus,
        tmp_path_factory.mktemp("inspect"),
        schedule__steps=4,
        checkpoint__every=2,
        data__valid=[],
        parallel__tensor=2,
    )
    on_ranks(2, train_on_rank, config, 2, save=True)
    return config.folder


def test_a_whole_one_is_described(run):
    code, out, err = call("tools/inspect_checkpoint.py", run, "--tensors")
    assert code == 0, err
    assert f"{run}/checkpoints/step_00000004: whole, every byte as it was written" in out
    assert "step 4, 32 sequences, 512 tokens" in out
    assert "tensor 2, pipeline 1" in out
    assert "  embedding.word_embeddings.weight  384x32  float32\n" in out
    code, out, _ = call_forked("tools/inspect_checkpoint.py", run / "checkpoints/step_00000002", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["step"] == 2
    assert found["tensors"]["decoder.final_layernorm.weight"] == [[32], "float32"]


def test_a_flipped_bit_is_named(run):
    shard = run / "checkpoints/step_00000002/__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 4
    shard.write_bytes(data)
    code, out, err = call_forked("tools/inspect_checkpoint.py", shard.parent)
    assert (code, out) == (2, "")
    assert err == f"error: {shard} is damaged: its content has changed since it was written; take another one\n"
    assert call_forked("tools/inspect_checkpoint.py", shard.parent, "--no-hashes")[0] == 0


def test_a_folder_without_any_is_said(tmp_path):
    code, _, err = call_forked("tools/inspect_checkpoint.py", tmp_path)
    assert code == 2
    assert err.startswith(f"error: {tmp_path}: no complete checkpoint in it; give a run folder")
