"""A fault of a corpus, or of a command that reads one, gives one sentence, exit code 2, and no output."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import re
import socket
import struct

import pytest
import zstandard

from megadiff.data.documents import Corpus
from megadiff.data.preprocess import preprocess
from megadiff.errors import DataError
from tests.support.disk import watched_disk
from tests.support.forked_command import call_forked
from tests.support.permissions import heed_permissions

SERIAL, SHARDS = "--output-prefix", "--shards"
GOOD = b"".join(json.dumps({"text": f"n\u00e9e {n} and some more text", "n": n}).encode() + b"\n" for n in range(400))


def parquet(rows=None):
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    rows = rows or [{"text": f"text {n}", "n": n} for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression="gzip", use_dictionary=False)
    return file.getvalue()


def arrow():
    import pyarrow

    file, table = io.BytesIO(), pyarrow.table({"text": ["a text"] * 2000})
    with pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return file.getvalue()


def in_the_middle(content, damage=bytes(40)):
    middle = len(content) // 2
    return content[:middle] + damage + content[middle + len(damage) :]


def with_dictionary():
    dictionary = zstandard.train_dictionary(1024, [GOOD[n : n + 100] for n in range(0, len(GOOD) - 100, 50)])
    return zstandard.ZstdCompressor(dict_data=dictionary).compress(GOOD)


def with_window(log):
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
    return zstandard.ZstdCompressor(compression_params=parameters).compressobj().compress(b"") + struct.pack(
        "<IBB", 0xFD2FB528, 0, (log - 10) << 3
    )


FILES = {
    # parquet and arrow
    "garbage.parquet": (lambda: b"not parquet at all" * 40, r"the parquet file is cut or damaged"),
    "empty.parquet": (lambda: b"", r"the parquet file is cut or damaged"),
    "cut.parquet": (lambda: parquet()[:-30], r"the parquet file is cut or damaged"),
    "page.parquet": (lambda: parquet()[:200] + bytes(300) + parquet()[500:], r"the parquet file is cut or damaged"),
    "column.parquet": (lambda: parquet([{"body": "a"}]), r"no column `text` \(columns here: body\); choose with --js"),
    "number.parquet": (lambda: parquet([{"text": 3}]), r":1: `text` must be a string, found a number"),
    "bytes.parquet": (lambda: parquet([{"text": b"a"}]), r":1: `text` must be a string, found an object"),
    "null.parquet": (lambda: parquet([{"text": "a"}, {"text": None}]), r":2: `text` must be a string, found null"),
    "garbage.arrow": (lambda: b"not arrow at all" * 40, r"the arrow file is cut or damaged"),
    "empty.arrow": (lambda: b"", r"the arrow file is cut or damaged"),
    "cut.arrow": (lambda: arrow()[:-900], r"the arrow file is cut or damaged"),
    # compressed
    "cut.jsonl.zst": (lambda: zstandard.compress(GOOD)[:-9], r"the compressed file is cut short"),
    "damaged.jsonl.zst": (lambda: in_the_middle(zstandard.compress(GOOD)), r"not a whole \.zst file"),
    "dictionary.jsonl.zst": (with_dictionary, r"not a whole \.zst file \(.*ictionary.*\); fetch or make it again"),
    "window.jsonl.zst": (lambda: with_window(31), r"not a whole \.zst file \(.*memory.*\); fetch or make it again"),
    "trailing.jsonl.gz": (lambda: gzip.compress(GOOD) + b"left over", r"not a whole \.gz file"),
    "cut.jsonl.gz": (lambda: gzip.compress(GOOD)[:-3], r"the compressed file is cut short"),
    "cut.jsonl.bz2": (lambda: bz2.compress(GOOD)[:-3], r"the compressed file is cut short"),
    "damaged.jsonl.xz": (lambda: in_the_middle(lzma.compress(GOOD)), r"not a whole \.xz file"),
    "name.jsonl": (lambda: gzip.compress(GOOD), r":1: invalid UTF-8 at byte 1 of the line \(0x8b\)"),
    # lines
    "empty.jsonl": (lambda: b"", r"no documents to write; check the input files and the text key"),
    "blank.jsonl": (lambda: b'{"text": ""}\n\n', r"no documents to write"),
    "last.jsonl": (lambda: GOOD + b'{"text": "cut he', r":401: not a JSON object \(.*\); correct the line"),
    "list.jsonl": (lambda: b'[{"text": "a"}]', r":1: wanted a JSON object with the key `text`, found a list; write o"),
    "pretty.json": (lambda: b'{\n  "text": "a"\n}\n', r":1: not a JSON object"),
    "chat.jsonl": (
        lambda: b'{"id": 1, "talk": [{"role": "user", "content": "a"}]}',
        r":1: no key `text` \(keys here: id, talk; choose with --json-key, or for messages --chat-key talk\)",
    ),
    "key.jsonl": (lambda: b'{"body": "a"}', r":1: no key `text` \(keys here: body; choose with --json-key\)"),
    "latin.jsonl": (lambda: '{"text": "n\u00e9e"}'.encode("latin1"), r":1: invalid UTF-8 at byte \d+ .*; convert"),
    "utf16.jsonl": (lambda: '{"text": "a"}'.encode("utf-16"), r":1: invalid UTF-8 .*iconv -f utf-16"),
    "nul.jsonl": (lambda: GOOD + bytes(3000), r":401: not a JSON object"),
    "long.jsonl": (lambda: b'{"text": "' + b"x" * 2**21 + b'"}', r":1: the line is longer than 1048576 bytes"),
    "deep.jsonl": (lambda: b'{"text": ' + b"[" * 10**5, r":1: not a JSON object"),
    # csv
    "column.csv": (lambda: b"id,body\n1,a\n", r"no column `text` \(columns here: id, body\); choose with --json-key"),
    "empty.csv": (lambda: b"", r"no column `text` \(columns here: \)|no documents to write"),
    "short.csv": (lambda: b"id,text\n1\n", r"no documents to write|:2: "),
    "quote.csv": (lambda: b'text\n"open\n' + b"more\n" * 2**19, r":\d+: not a record \(.*\); correct the quotes"),
    "latin.csv": (lambda: "text\nn\u00e9e\n".encode("latin1"), r":2: invalid UTF-8 at byte \d+"),
}  # fmt: skip
"""Names of files, their content, and the sentence."""


def refused(tmp_path, said, *words, output="out/x", before=None, kinds=("--output-prefix", "--shards")):
    """Run the command serially and with shards; each must end with the sentence and leave no data."""
    for kind in kinds:
        command = ("tools/preprocess_data.py", "--tokenizer", "byte", *words, kind, tmp_path / output)
        ended = call_forked(*command, before=before)
        assert ended.code == 2, ended.err
        assert ended.err.startswith("error: ")
        assert re.search(said, ended.err), ended.err
        assert ended.err.count("\n") == 1, ended.err
        assert not list(tmp_path.rglob("*.idx"))


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_one_sentence(tmp_path, name):
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content())
    refused(tmp_path, said, "--input", tmp_path / name, "--max-document-mb", "1")


PLACES = {
    "a folder with a corpus file's name": (lambda path: path.mkdir(), r"found a folder without files that end in one"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), r"a\.jsonl: no such file; check the path"),
    "a link to itself": (lambda path: path.symlink_to(path), r"a\.jsonl: no such file; check the path"),
    "a file that may not be read": (
        lambda path: path.write_bytes(GOOD) and path.chmod(0),
        r"a\.jsonl: cannot be read \(Permission denied\); check its permissions",
    ),
}
"""Kinds of things at the place of the file, and the sentence about each."""


@pytest.mark.parametrize("place", PLACES)
def test_a_place_without_a_readable_file_is_one_sentence(tmp_path, place):
    make, said = PLACES[place]
    make(tmp_path / "a.jsonl")
    refused(tmp_path, said, "--input", tmp_path / "a.jsonl", before=heed_permissions)


def test_a_socket_or_a_device_is_no_corpus(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "a.jsonl"))
        refused(tmp_path, r"a\.jsonl: cannot be read \(No such device", "--input", tmp_path / "a.jsonl", kinds=[SERIAL])
        refused(
            tmp_path, r"a\.jsonl: wanted a plain file for --shards", "--input", tmp_path / "a.jsonl", kinds=[SHARDS]
        )
    (tmp_path / "b.jsonl").symlink_to("/dev/null")
    refused(tmp_path, r"no documents to write", "--input", tmp_path / "b.jsonl", kinds=[SERIAL])


def test_a_name_that_is_too_long_is_one_sentence(tmp_path):
    refused(tmp_path, r"File name too long; check the path|no such file", "--input", tmp_path / f"{'x' * 300}.jsonl")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_vanishes_before_it_is_read_is_one_sentence(tmp_path, kind):
    paths = [tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"]
    for path in paths:
        path.write_bytes(GOOD if kind == "jsonl" else parquet())
    corpus = Corpus(paths)
    paths[1].unlink()
    with pytest.raises(DataError, match=rf"b\.{kind}: .*No such file"):
        list(corpus.documents())


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "out").mkdir(mode=0o555)
    said = r"out/.*(cannot be written|writing failed) \(Permission denied\); "
    refused(tmp_path, said, "--input", tmp_path / "a.jsonl", before=heed_permissions)
    (tmp_path / "file").write_text("")
    said = r"file/x.*(cannot be written|writing failed) \((Not a directory|File exists)\); "
    refused(tmp_path, said, "--input", tmp_path / "a.jsonl", output="file/x")


def test_an_input_is_not_replaced_by_the_output(tmp_path):
    (tmp_path / "a.json").write_bytes(GOOD)
    (tmp_path / "link").symlink_to(tmp_path)
    said = r"a\.json: wanted another file than an input, found one after --input; choose another --output-prefix"
    for given in (tmp_path / "a.json", tmp_path / "link/a.json"):
        refused(tmp_path, said, "--input", given, "--overwrite", output="a", kinds=[SERIAL])
    assert (tmp_path / "a.json").read_bytes() == GOOD


TOKENIZERS = {
    "t.json": (b'{"model": ', r"t\.json"),
    "other.json": (b'{"a": 1}', r"other\.json"),
    "t.model": (b"not a model", r"t\.model"),
    "t.txt": (b"a text", r"t\.txt: wanted .*, found another file; check the path"),
}
"""Files in place of a tokenizer, and the sentence."""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_no_tokenizer_is_one_sentence(tmp_path, name):
    content, said = TOKENIZERS[name]
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, said, "--input", tmp_path / "a.jsonl", "--tokenizer", tmp_path / name)


OPTIONS = {
    "--max-bad-lines -1": r"--max-bad-lines must be at least 0",
    "--max-document-mb 0": r"--max-document-mb above 0",
    "--valid-fraction 1.5": r"--valid-fraction must be from 0 to below 1, found 1\.5",
    "--split valid": r"--split valid: wanted --valid-fraction above 0 beside it",
    "--min-characters 9 --max-characters 3": r"--min-characters must be at least 0 and at most --max-characters",
    "--min-characters 9000": r"no documents to write",
    "--template {text": r"--template '\{text': .*; write for example",
    "--text-split word": r"--text-split: wanted .*line.*, found 'word'|--text-split.*'word'",
    "--append-eod --tokenizer {tmp}/a.jsonl": r"a\.jsonl: wanted .*, found another file; check the path",
    "--workers 0": r"--workers must be at least 1, found 0",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_mean_nothing_are_one_sentence(tmp_path, options):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    refused(
        tmp_path, OPTIONS[options], "--input", tmp_path / "a.jsonl", *options.replace("{tmp}", str(tmp_path)).split()
    )


def test_a_full_disk_is_one_sentence_whenever_it_fills(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    count = 0
    while True:
        left = [count]

        def refuse(what, left=left):
            left[0] -= "/p" in what and not what.startswith(("unlink", "rmdir", "remove"))
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        said = None
        with watched_disk(refuse):
            try:
                preprocess(Corpus([tmp_path / "a.jsonl"]), tmp_path / "p", "byte")
            except DataError as error:
                said = str(error)
        if said is None:
            break
        assert "No space left on device" in said
        assert "\n" not in said
        assert not (tmp_path / "p.idx").exists()
        count += 1
    assert count > 3
    assert (tmp_path / "p.idx").exists()
