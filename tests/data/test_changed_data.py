"""A run goes on with the data and the tokenizer it began with, or says what has changed."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from megadiff.data.config import DataConfig
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.open import open_data
from megadiff.data.tokenizer_training import train_tokenizer
from megadiff.data.tokenizers import load_tokenizer
from megadiff.data.tokenizers.byte import ByteTokenizer
from tests.data.corpora import random_documents, write_indexed
from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree, write_corpus


def fingerprint(prefix):
    tree = DataConfig.model_validate({"train": [str(prefix)], "tokenizer": "byte"})
    return open_data(tree, ByteTokenizer(), seq_length=16, seed=1, valid_sequences=4).fingerprint


def test_the_fingerprint_of_a_run_s_data_changes_with_any_token(tmp_path):
    prefix = write_indexed(tmp_path / "p", random_documents(20))
    whole, first = (tmp_path / "p.bin").read_bytes(), fingerprint(prefix)
    draw = np.random.default_rng(0)
    for token in draw.integers(len(whole) // 2, size=40):
        changed = bytearray(whole)
        changed[2 * token] = 5 if changed[2 * token] != 5 else 6
        changed[2 * token + 1] = 0
        (tmp_path / "p.bin").write_bytes(changed)
        assert fingerprint(prefix) != first, token
    (tmp_path / "p.bin").write_bytes(whole)
    assert fingerprint(prefix) == first


def test_data_written_anew_with_the_same_content_are_the_same_data(tmp_path):
    for name in ("one", "other"):
        write_indexed(tmp_path / name, random_documents(20))
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "other")
    (tmp_path / "one.json").unlink()
    assert IndexedReader(tmp_path / "one").manifest is None
    assert fingerprint(tmp_path / "one") != fingerprint(tmp_path / "other"), "which tokenizer made them is not known"


def test_the_tokenizer_s_fingerprint_follows_its_meaning_and_no_more(tmp_path):
    folder = tmp_path / "tokenizer"
    train_tokenizer(["some text to learn from, and some more"] * 20, folder, kind="bpe", vocab_size=275)
    first = load_tokenizer(folder).fingerprint
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree, indent=7, sort_keys=True))
    assert load_tokenizer(folder).fingerprint == first
    tree["model"]["merges"] = tree["model"]["merges"][:-1]
    path.write_text(json.dumps(tree))
    assert load_tokenizer(folder).fingerprint != first
    shutil.rmtree(folder)
    train_tokenizer(["some text to learn from, and some more"] * 20, folder, kind="bpe", vocab_size=274)
    assert load_tokenizer(folder).fingerprint != first


@pytest.fixture
def begun(tmp_path):
    """A run of two steps on data of its own: (description, prefix)."""
    prefix = write_corpus(tmp_path / "corpus")
    tree = toy_tree(prefix, tmp_path, model__layers=1, data__valid=[], schedule__steps=2, schedule__warmup_steps=1)
    description = write_yaml(tmp_path / "run.yaml", tree)
    ended = call_forked("pretrain_dlm.py", "--config", description)
    assert ended.code == 0, ended.err
    return description, prefix


def test_one_changed_token_is_refused_on_resume_and_recorded_if_allowed(begun):
    description, prefix = begun
    before = fingerprint(prefix)
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(2 * 1234)
        file.write((200).to_bytes(2, "little"))
    command = ("pretrain_dlm.py", "--config", description, "schedule.steps=3")
    ended = call_forked(*command)
    assert ended.code == 2, ended.err
    assert re.search(rf'data_fingerprint: "{before[:12]}" -> "[0-9a-f]{{12}}"', ended.err)
    assert "--allow-data-change" in ended.err
    assert len(ended.err.splitlines()) == 1
    ended = call_forked(*command, "--allow-data-change")
    assert ended.code == 0, ended.err


def test_a_token_outside_the_vocabulary_is_refused_with_its_document(begun):
    description, prefix = begun
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(2 * 1234)
        file.write((3).to_bytes(2, "little"))
    document, within = IndexedReader(prefix).locate(1234)
    ended = call_forked("pretrain_dlm.py", "--config", description, "name=other")
    assert ended.code == 2
    assert f"document {document} has the token id 3 at position {within} (the mask id)" in ended.err
