"""Documents left out by their text, and a held-out split that shares no text with the rest."""

import pytest

from megadiff.data.documents import Corpus, DocumentFilters, digest
from megadiff.errors import DataError
from tests.support.forked_command import call_forked

TEXTS = [f"text {n % 700}" for n in range(1000)]


def write(path, texts):
    path.write_text("\n".join(texts) + "\n")
    return path


def kept(path, **settings):
    corpus = Corpus([path], text_split="line", filters=DocumentFilters(**settings))
    return list(corpus.documents()), corpus.report


def test_a_split_depends_on_the_text_alone(tmp_path):
    file = write(tmp_path / "a.txt", TEXTS)
    train, report = kept(file, valid_fraction=0.2)
    valid, other = kept(file, valid_fraction=0.2, split="valid")
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(TEXTS)
    assert abs(len(set(valid)) / 700 - 0.2) < 4 * (0.2 * 0.8 / 700) ** 0.5
    assert (report.other_split, other.other_split) == (len(valid), len(train))
    again, _ = kept(write(tmp_path / "b.txt", TEXTS[::-1]), valid_fraction=0.2, split="valid")
    assert again == valid[::-1]
    larger, _ = kept(file, valid_fraction=0.3, split="valid")
    assert set(valid) < set(larger)


def test_the_digest_does_not_change():
    """Another digest would move documents between the splits of a corpus that has been tokenized before."""
    assert digest("née").hex() == "46bde7d2abd513a23e1c94f0cb40eb79"


def test_lengths_are_counted_in_characters(tmp_path):
    file = write(tmp_path / "a.txt", ["é" * n for n in range(1, 11)])
    texts, report = kept(file, min_characters=3, max_characters=7)
    assert [len(text) for text in texts] == [3, 4, 5, 6, 7]
    assert (report.documents, report.too_short, report.too_long) == (5, 2, 3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"valid_fraction": 1.0}, "--valid-fraction must be from 0 to below 1, found 1"),
        ({"valid_fraction": -0.1}, "--valid-fraction must be from 0 to below 1"),
        ({"split": "valid"}, "--split valid: wanted --valid-fraction above 0 beside it, found none"),
        (
            {"min_characters": 5, "max_characters": 4},
            "--min-characters must be at least 0 and at most .* found 5 and 4",
        ),
        ({"min_characters": -1}, "--min-characters must be at least 0"),
        ({"max_characters": 0}, "at most --max-characters, found 0 and 0"),
    ],
)
def test_filters_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(DataError, match=said):
        DocumentFilters(**settings)


def test_the_command_counts_what_it_leaves_out(tmp_path):
    file = write(tmp_path / "a.txt", TEXTS)
    words = ["--input", file, "--text-split", "line", "--tokenizer", "byte", "--min-characters", "7"]
    words += ["--valid-fraction", "0.5", "--output-prefix", tmp_path / "p"]
    ended = call_forked("tools/preprocess_data.py", *words, "--split", "valid")
    assert ended.code == 0
    valid, report = kept(file, min_characters=7, valid_fraction=0.5, split="valid")
    assert ended.err == (
        f"left out {report.too_short} document(s) with fewer than --min-characters\n"
        f"left out {report.other_split} document(s) of the other split\n"
    )
    assert f"wrote {tmp_path}/p: {len(valid)} documents" in ended.out
