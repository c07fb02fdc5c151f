"""Likely mistakes in a run's data are named, with the key and the figures; what is in order is not."""

from __future__ import annotations

import numpy as np
import pytest

from megadiff.data.config import DataConfig
from megadiff.data.facts import NAME, DataFacts, read_data_facts, write_data_facts
from megadiff.data.open import open_data, shortest_ends
from megadiff.data.review import advice, describe_sources, source_facts, validation_facts
from megadiff.data.tokenizers.byte import ByteTokenizer
from tests.data.corpora import write_indexed

L = 16
SEQUENCES = {"big": 300, "middle": 100, "small": 10, "valid": 40}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("sources"), np.random.default_rng(1)
    found = {}
    for name, sequences in SEQUENCES.items():
        ids = draw.integers(4, 260, size=sequences * L).tolist()
        found[name] = str(write_indexed(folder / name, [ids[i : i + 50] for i in range(0, len(ids), 50)]))
        if name == "big":
            part = ids[900:2900]
            found["part"] = str(write_indexed(folder / "part", [part[i : i + 50] for i in range(0, 2000, 50)]))
    return found


def described(paths, train, valid=("valid",)):
    entries = [{"path": paths[entry]} if isinstance(entry, str) else
               {"path": paths[entry[0]], "weight": entry[1]} for entry in train]  # fmt: skip
    config = DataConfig.model_validate(
        {"train": entries, "valid": [paths[name] for name in valid], "tokenizer": "byte"}
    )
    return open_data(config, ByteTokenizer(), seq_length=L, seed=1, valid_sequences=20), config


def mistakes(paths, train, samples, valid=("valid",), eval_sequences=20):
    data, config = described(paths, train, valid)
    return [
        found.text
        for found in advice(data, config, end=samples, length="schedule.steps = 9", eval_sequences=eval_sequences)
    ]


@pytest.mark.parametrize(
    ("train", "samples"),
    [
        (["big"], 1200),
        (["big", "small"], 1240),
        ([("big", 3), ("middle", 1)], 800),
        ([("big", 30), ("small", 1)], 300),
        ([("big", 1), ("small", 1)], 18),
    ],
)
def test_what_is_in_order_is_not_a_mistake(paths, train, samples):
    assert mistakes(paths, train, samples) == []


def test_more_than_four_epochs_are_named_with_the_key_that_makes_them(paths):
    assert mistakes(paths, ["big"], 1202) == [
        "the schedule takes 19,232 tokens of 4,800: 4.01 epochs (schedule.steps = 9)"
    ]


def test_a_source_repeated_far_more_than_another_is_named_with_figures(paths):
    (found,) = mistakes(paths, [("big", 1), ("small", 1)], 100)
    assert found == "data.train[1] (small) is gone through 5.0 times by the end, data.train[0] (big) 0.17 times"
    (found,) = mistakes(paths, [("big", 1), ("small", 1)], 24)
    assert found == "data.train[1] (small) is gone through 1.2 times by the end, data.train[0] (big) 0.04 times"


@pytest.mark.parametrize("valid", ["big", "part"])
def test_validation_on_part_of_a_training_source_is_named_too(paths, valid):
    (found,) = mistakes(paths, ["middle", "big"], 100, [valid, "valid"], eval_sequences=20)
    how = "is the same text as" if valid == "big" else "has 8 of 8 passages word for word in"
    assert found == (
        f"data.valid[0] ({valid}) {how} data.train[1] (big): the held-out bound is measured on training text"
    )


def test_no_swapped_and_too_little_validation(paths):
    assert mistakes(paths, ["big"], 100, []) == ["data.valid is empty: no held-out bound will be measured"]
    assert mistakes(paths, ["small"], 10, ["middle"]) == [
        "data.valid has 1,600 tokens, more than the 160 of data.train"
    ]
    assert mistakes(paths, ["big"], 100, eval_sequences=64) == [
        "eval.sequences is 64, but data.valid[0] (valid) has 40 sequences: all of them are measured, and no more"
    ]


def test_a_missing_weight_and_a_source_listed_twice_are_named(paths):
    assert mistakes(paths, [("big", 2), "middle"], 100) == [
        "data.train[1] has no weight beside sources that do, and counts as weight 1"
    ]
    assert mistakes(paths, ["big", "middle", "big"], 100) == [
        "data.train[0] and data.train[2] hold the same text, and are drawn from as one source with their shares added"
    ]


def test_the_lines_give_each_source_its_size_share_and_epochs(paths):
    data, _ = described(paths, [("big", 3), ("small", 1)])
    assert describe_sources(data, now=20, end=40) == [
        "data              4,960 tokens to train on in 2 sources, shared by weight: 0.13 epochs at the end",
        "  data.train[0]   big: 4,800 tokens, 300 sequences, share 75.00%, 0.05 epochs so far, 0.10 epochs at the end",
        "  data.train[1]   small: 160 tokens, 10 sequences, share 25.00%, 0.50 epochs so far, 1.00 epochs at the end",
    ]


def test_labels_are_the_shortest_that_differ():
    assert shortest_ends(["x/train"]) == ["train"]
    assert shortest_ends(["/a/train", "/b/train", "/b/c"]) == ["a/train", "b/train", "b/c"]
    assert shortest_ends(["train", "x/train"]) == ["train", "x/train"]


def test_facts_are_read_back_and_what_is_none_is_missing(paths, tmp_path):
    data, _ = described(paths, ["big", "small"])
    facts = DataFacts(
        step=3,
        fingerprint=data.fingerprint,
        train=source_facts(data, now=0, end=310),
        valid=validation_facts(data),
        advice=["a doubt"],
        vocab_size=260,
    )
    write_data_facts(tmp_path, facts)
    assert read_data_facts(tmp_path) == facts
    assert [(found.share, found.epochs_at_end) for found in facts.train] == [(300 / 310, 1.0), (10 / 310, 1.0)]
    assert (facts.valid[0].sequences, facts.valid[0].measured, facts.valid[0].measured_tokens) == (40, 20, 320)
    for damaged in (b"", b"{", b"[]", b'{"step": 1}', b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"\xff"):
        (tmp_path / NAME).write_bytes(damaged)
        assert read_data_facts(tmp_path) is None
    (tmp_path / NAME).unlink()
    assert read_data_facts(tmp_path) is None
