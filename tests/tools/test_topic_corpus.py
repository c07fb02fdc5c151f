"""The synthetic corpus has the entropy it says it has."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from tools import topic_corpus


def test_entropy_is_in_nats_and_knows_zeros():
    assert topic_corpus.entropy(np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).tolist() == pytest.approx([np.log(2), 0])


def test_documents_follow_their_topics(tmp_path):
    laws = topic_corpus.topics(3, seed=0)
    assert laws.shape == (3, 26)
    assert laws.sum(1).tolist() == pytest.approx([1, 1, 1])
    topic_corpus.write(tmp_path / "a.jsonl", laws, documents=30, length=4000, seed=1)
    seen = Counter()
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        counts = np.bincount([ord(letter) - ord("a") for letter in json.loads(line)["text"]], minlength=26)
        distances = np.abs(counts / 4000 - laws).sum(1)
        assert distances.min() < 0.1
        seen[int(distances.argmin())] += 1
    assert set(seen) == {0, 1, 2}


def test_the_same_seed_writes_the_same_text(tmp_path):
    laws = topic_corpus.topics(2, seed=0)
    for name in ("a", "b"):
        topic_corpus.write(tmp_path / name, laws, documents=3, length=20, seed=4)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
