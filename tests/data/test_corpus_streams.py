"""Compressed files, folders, patterns and standard input."""

import bz2
import json
import lzma
import os
import subprocess
import sys

import pytest

from megadiff.data.corpus_streams import expanded
from megadiff.data.documents import Corpus
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.support.commands import REPOSITORY
from tests.support.forked_command import call_forked

TEXTS = [f"née {n}" for n in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACKERS = {".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_read_as_their_content(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](LINES[:1000]) + PACKERS[suffix](LINES[1000:]))
    assert list(Corpus([path]).documents()) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_damage_is_one_sentence_whatever_compressed_the_file(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    packed = PACKERS[suffix](LINES)
    for content, said in (
        (packed[: len(packed) // 2], "the compressed file is cut short"),
        (packed[:40] + bytes(40) + packed[80:], rf"not a whole {suffix} file"),
        (b"", r"cut short \(the file is empty\)"),
        (LINES, rf"not a whole {suffix} file"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            list(Corpus([path]).documents())


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_bomb_is_read_in_bounded_memory(tmp_path, suffix):
    import tracemalloc

    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](bytes(2**26)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"the line is longer than 1048576 bytes"):
        list(Corpus([path], max_document_bytes=2**20).documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_folders_and_patterns_are_their_files_in_order(tmp_path):
    for name in ("b/2.jsonl", "b/1.txt.xz", "b/readme.md", "b/.hidden.jsonl", "b/.git/x.txt", "a.jsonl", "c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = expanded([tmp_path / "b", tmp_path / "?.jsonl", tmp_path / "none.jsonl", "-"])
    assert [str(path.relative_to(tmp_path)) for path in found[:-1]] == [
        "b/1.txt.xz", "b/2.jsonl", "a.jsonl", "c.jsonl", "none.jsonl",
    ]  # fmt: skip
    assert str(found[-1]) == "-"
    with pytest.raises(DataError, match=r"\*\.csv: no file matches; check the path after --input"):
        expanded([tmp_path / "*.csv"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: wanted a file, found a folder without files that end in one of"):
        expanded([tmp_path / "empty"])


def test_json_lines_come_from_standard_input(tmp_path):
    command = [sys.executable, "tools/preprocess_data.py", "--input", "-", "--tokenizer", "byte"]
    done = subprocess.run(
        [*command, "--output-prefix", tmp_path / "p"], input=LINES, cwd=REPOSITORY, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    reader = IndexedReader(tmp_path / "p")
    assert [ByteTokenizer().decode(reader.document(i)) for i in range(reader.num_documents)] == TEXTS
    refused = call_forked("tools/preprocess_data.py", *command[2:], "--shards", tmp_path / "s")
    assert refused.code == 2
    assert "--input -: wanted files for --shards, found standard input; use --output-prefix" in refused.err


def test_a_name_that_no_manifest_can_hold_is_refused_before_reading(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    with open(path, "wb") as file:
        file.write(LINES)
    ended = call_forked("tools/preprocess_data.py", "--input", path, "--tokenizer", "byte", "--shards", tmp_path / "s")
    assert ended.code == 2
    assert "wanted a path in UTF-8, found other bytes in it; rename the file" in ended.err
    assert not (tmp_path / "s").exists()
