"""The corpus every Python installation carries."""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from megadiff.errors import DataError
from tools import demo_corpus

LIBRARY = Path(sysconfig.get_path("stdlib"))


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The topics and one package, which is enough for all but the size."""
    output = tmp_path_factory.mktemp("corpus")
    counts = demo_corpus.write_corpus(output, LIBRARY / "asyncio")
    return output, counts


def test_the_splits_share_no_text_and_hold_none_twice(corpus):
    output, counts = corpus
    train, valid = texts(output / "train.jsonl"), texts(output / "valid.jsonl")
    assert len(set(train)) == len(train)
    assert len(set(valid)) == len(valid)
    assert not set(train) & set(valid)
    assert counts == {
        "train": (len(train), sum(map(len, train))),
        "valid": (len(valid), sum(map(len, valid))),
    }


def test_a_second_run_writes_the_same_bytes_and_leaves_nothing_else(corpus, tmp_path):
    output, _ = corpus
    demo_corpus.write_corpus(tmp_path, LIBRARY / "asyncio")
    names = ["LICENSE.txt", "train.jsonl", "valid.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


def test_a_text_keeps_its_side_whatever_stands_beside_it(corpus):
    """The split hangs on the text's own hash, so another Python's corpus cannot leak valid into train."""
    output, _ = corpus
    assert not any(demo_corpus.is_valid(text) for text in texts(output / "train.jsonl"))
    assert all(demo_corpus.is_valid(text) for text in texts(output / "valid.jsonl"))


def test_the_licence_is_told(corpus):
    assert "PSF License Agreement, version 2" in (corpus[0] / "LICENSE.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("A :class:`~os.PathLike` or :py:func:`dict`.", "A os.PathLike or dict."),
        ("Title\n*****\n\n\n\nUse **two** and ``x = 1``.  \n", "Title\n\nUse two and `x = 1`."),
        ("a\tb   ", "a   b"),
    ],
)
def test_markup_is_taken_off(raw, cleaned):
    assert demo_corpus.clean(raw) == cleaned


def test_prose_is_found_without_importing_or_tripping_over_broken_files(tmp_path):
    (tmp_path / "fine.py").write_text(
        '"""Module."""\nraise SystemExit\n# one\n# two\n# three\n'
        'try:\n    class A:\n        """Class."""\nfinally:\n    pass\n'
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "latin.py").write_bytes(b"# \xff\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/other.py").write_text('"""Not the library\'s."""\n')
    assert list(demo_corpus.library_texts(tmp_path)) == [
        ("fine.py", "Module."),
        ("fine.py", "Class."),
        ("fine.py", "one\ntwo\nthree\n"),
    ]


def test_an_output_that_cannot_be_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["demo_corpus.py", "--output", str(tmp_path / "file")])
    with pytest.raises(DataError, match=r"/file: cannot be written or read: File exists$"):
        demo_corpus.main()


@pytest.mark.end_to_end
def test_the_whole_library_gives_enough_to_train_on(tmp_path):
    """3 MB on a full CPython; distributions that ship the library without its tests give over 2 MB."""
    counts = demo_corpus.write_corpus(tmp_path, LIBRARY)
    total = counts["train"][1] + counts["valid"][1]
    assert total > (3_000_000 if (LIBRARY / "test" / "test_email").exists() else 2_000_000)
    assert 0.02 < counts["valid"][0] / (counts["train"][0] + counts["valid"][0]) < 0.08
