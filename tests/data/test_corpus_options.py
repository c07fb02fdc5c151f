"""Options of the commands that read a corpus, and what these report of its files."""

import argparse
import gzip

import pytest

from megadiff.data.corpus_options import add_corpus_options, corpus_from, describe_files, describe_skipped

POEMS = "one\ntwo\n\nthree\n\n\nfour\n"


def corpus(*words):
    parser = argparse.ArgumentParser()
    add_corpus_options(parser)
    return corpus_from(parser.parse_args(["--input", *map(str, words)]))


@pytest.mark.parametrize(("options", "counts"), [((), (1, 1)), (("--text-split", "line"), (4, 4))])
def test_documents_are_counted_per_file_and_whole_text_files_pointed_out(tmp_path, options, counts):
    plain, packed, lines = tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.jsonl"
    plain.write_text(POEMS)
    packed.write_bytes(gzip.compress(POEMS.encode()))
    lines.write_text('{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    found = corpus(plain, packed, lines, *options)
    list(found.documents())
    said = describe_files(found)
    assert said[:3] == [
        f"{plain}: {counts[0]} document(s) read",
        f"{packed}: {counts[1]} document(s) read",
        f"{lines}: 2 document(s) read",
    ]
    note = "note: each .txt file was taken as one document; --text-split line or blank-line makes several of it"
    assert said[3:] == ([] if options else [note])


def test_many_files_are_summed_up(tmp_path):
    paths = [tmp_path / f"{i:02}.jsonl" for i in range(23)]
    for path in paths:
        path.write_text('{"text": "a"}\n' * 2)
    found = corpus(*paths)
    list(found.documents())
    said = describe_files(found)
    assert (len(said), said[-1]) == (21, "3 more files: 6 documents read")


def test_what_was_skipped_is_listed_and_the_rest_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n" * 30 + '{"text": "a\\ud800"}\n')
    found = corpus(tmp_path / "a.jsonl", "--max-bad-lines", "30", "--max-document-mb", "0.5")
    assert list(found.documents()) == ["a\ufffd"]
    said = describe_skipped(found)
    assert said[0].startswith(f"skipped {tmp_path}/a.jsonl:1: not a JSON object (Expecting value at character 0")
    assert said[20:] == [
        "skipped 10 more bad lines",
        "note: in 1 document(s) halves of surrogate pairs, which are no characters, were replaced by U+FFFD",
    ]
    assert found.max_document_bytes == 2**19
