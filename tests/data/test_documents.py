import gzip
import hashlib
import json
import random
import resource
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data import documents
from megadiff.data.documents import Corpus
from megadiff.errors import DataError
from tests.security.children import in_child

LINES = [{"text": "one"}, {"text": "two\nlines"}, {"text": "drei €"}]
JSONL = "".join(json.dumps(line) + "\n" for line in LINES).encode()
TEXTS = [line["text"] for line in LINES]
ZST = zstandard.ZstdCompressor(write_checksum=True).compress(JSONL)
"""As the zstd command writes it; without a checksum a flipped bit may be undetectable."""


def read(path, **options):
    corpus = Corpus([path], **options)
    return list(corpus.documents()), corpus.report


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.json", JSONL),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)),
        ("two-members.jsonl.gz", gzip.compress(JSONL[:10], mtime=0) + gzip.compress(JSONL[10:], mtime=0)),
        ("a.jsonl.zst", zstandard.compress(JSONL)),
        ("two-frames.jsonl.zst", zstandard.compress(JSONL[:10]) + zstandard.compress(JSONL[10:])),
        ("no-last-newline.jsonl", JSONL.rstrip(b"\n")),
        ("crlf.jsonl", JSONL.replace(b"\n", b"\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("blank-lines.jsonl", JSONL.replace(b"\n", b"\n\n \n")),
    ],
)
def test_every_kind_gives_the_same_documents_and_the_hash_of_the_file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    texts, report = read(path)
    assert texts == TEXTS
    assert (report.documents, report.bad_lines, report.bytes_read) == (3, 0, len(content))
    assert [(f.name, f.bytes, f.sha256) for f in report.files] == [
        (name, len(content), hashlib.sha256(content).hexdigest())
    ]


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfA\r\n\n\nB\n")
    assert read(path)[0] == ["A\r\n\n\nB\n"]


def test_empty_texts_are_skipped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": ""}\n{"text": "x"}\n{"text": ""}\n')
    texts, report = read(path)
    assert texts == ["x"]
    assert (report.documents, report.empty_documents, report.bad_lines) == (1, 2, 0)


BAD_LINES = {
    "not JSON": (b"{oops", r"not a JSON object"),
    "half a line": (b'{"text": "abc', r"not a JSON object"),
    "a list": (b"[1]", r"wanted a JSON object with the key `text`, found a list"),
    "no key": (b'{"body": "x", "id": 1}', r"no key `text` \(keys here: body, id; choose with --json-key\)"),
    "null": (b'{"text": null}', r"`text` must be a string, found null"),
    "a number": (b'{"text": 3}', r"`text` must be a string, found a number"),
    "invalid UTF-8": (b'{"text": "\xff"}', r"invalid UTF-8 at byte 10 of the line"),
    "a lone surrogate": (rb'{"text": "\ud800"}', r"not a JSON object"),
    "a byte-order mark inside": (b'\xef\xbb\xbf{"text": "x"}', r"not a JSON object"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_refused_with_its_number_or_skipped_and_listed(tmp_path, kind):
    line, reason = BAD_LINES[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "after"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}.*; mend the line or raise --max-bad-lines"):
        read(path)

    texts, report = read(path, max_bad_lines=1)

    assert texts == ["good", "after"]
    assert report.bad_lines == 1
    assert report.bad_examples[0].startswith(f"{path}:2: ")


def test_one_bad_line_more_than_allowed_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x\n" * 3)
    with pytest.raises(DataError, match=r"a\.jsonl:3: .*2 bad lines are allowed and this is one more"):
        read(path, max_bad_lines=2)


def test_a_nul_and_escapes_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(rb'{"text": "a\u0000b\ud83d\ude00"}' + b"\n")
    assert read(path)[0] == ["a\x00b\U0001f600"]


def test_a_line_beyond_the_bound_is_a_bad_line_and_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_CHUNK_BYTES", 7)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 200 + b'"}\n{"text": "b"}\n' + b"y" * 60)
    texts, report = read(path, max_bad_lines=2, max_document_bytes=50)
    assert texts == ["a", "b"]
    assert [example.split(": ")[0] for example in report.bad_examples] == [f"{path}:2", f"{path}:4"]


BOMB_BYTES = 400 * 2**20
CALM_BYTES = 160 * 2**20


def _bomb(path):
    """A line of 400 MiB in a file of a few hundred KB, with a good line before and after."""
    parts = [b'{"text": "a"}\n{"text": "', *[b"x" * 2**20] * (BOMB_BYTES // 2**20), b'"}\n{"text": "b"}\n']
    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.writelines(parts)
        return
    with open(path, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        for part in parts:
            packed.write(part)


def _read_bomb(path):
    corpus = Corpus([path], max_bad_lines=1, max_document_bytes=2**20)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CALM_BYTES, resource.RLIM_INFINITY))
    return list(corpus.documents()), corpus.report.bad_examples


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_decompression_bomb_is_a_bad_line_read_in_bounded_memory(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    _bomb(path)
    assert path.stat().st_size < 4 * 2**20
    texts, bad = in_child(_read_bomb, path)
    assert texts == ["a", "b"]
    assert bad == [f"{path}:2: the line is longer than 1048576 bytes (--max-document-mb)"]


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"text": ' * 100_000, b"9" * 100_000, b'{"text": "\x00"}'])
def test_hostile_json_is_a_bad_line(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b'\n{"text": "after"}\n')
    texts, report = in_child(lambda: read(path, max_bad_lines=1))
    assert (texts, report.bad_lines) == (["after"], 1)


def test_keys_of_a_corpus_cannot_break_a_message(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"a\nerror: all is well\x1b[2J": 1, "k" * 1000: 2}).encode())
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("options", [{"max_bad_lines": -1}, {"max_document_bytes": 0}])
def test_limits_that_mean_nothing_are_refused(tmp_path, options):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    with pytest.raises(DataError, match=r"--max-bad-lines must be at least 0 and --max-document-mb above 0"):
        Corpus([tmp_path / "a.jsonl"], **options)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst"]))
def test_damage_never_gives_half_a_document(tmp_path_factory, seed, suffix):
    """A pass over a cut file, or a compressed one with a flipped bit, that ends well gives texts of the corpus only."""
    draw = random.Random(seed)
    raw = bytearray({".jsonl": JSONL, ".jsonl.gz": gzip.compress(JSONL, mtime=0), ".jsonl.zst": ZST}[suffix])
    if suffix == ".jsonl" or draw.random() < 0.5:
        del raw[draw.randrange(len(raw)) :]
    else:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(bytes(raw))
    texts = []
    with suppress(DataError):
        texts = list(Corpus([path], max_bad_lines=3).documents())
    assert set(texts) <= set(TEXTS)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_cut_anywhere_is_refused(tmp_path, suffix):
    content = gzip.compress(JSONL, mtime=0) if suffix == ".gz" else zstandard.compress(JSONL)
    path = tmp_path / f"a.jsonl{suffix}"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"a\.jsonl{suffix}: (the compressed file is cut short|not a whole)"):
            read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_at_all_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(JSONL)
    with pytest.raises(DataError, match=rf"not a whole {suffix} file .*; fetch or make it again"):
        read(path)


def test_a_text_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("häuser".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt:1: invalid UTF-8 at byte 1"):
        read(path)


def test_wrong_paths_are_refused_before_reading(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        Corpus([tmp_path / "no.jsonl"])
    with pytest.raises(DataError, match=r"wanted a file, found a folder; name its files, for example .*/\*\.jsonl"):
        Corpus([tmp_path])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv: wanted a name that ends in one of \.jsonl"):
        Corpus([tmp_path / "a.csv"])
    with pytest.raises(DataError, match=r"no input files"):
        Corpus([])


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"reading parquet needs pyarrow; pip install 'megadiff\[parquet\]'"):
        read(tmp_path / "a.parquet")


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an optional extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "", "two"], "id": [1, 2, 3, 4]}), path)
    texts, report = read(path, max_bad_lines=1)
    assert texts == ["one", "two"]
    assert report.bad_examples == [f"{path}:2: `text` must be a string, found null"]
    assert report.files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=r"no column `body` \(columns here: text, id\)"):
        read(path, json_key="body")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"the parquet file is cut or damaged"):
        read(path)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text()), st.integers(1, 40))
def test_lines_do_not_depend_on_how_the_bytes_come(texts, chunk):
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    chunks = [content[i : i + chunk] for i in range(0, len(content), chunk)]
    found = list(documents._lines(chunks, limit=10**6))
    assert found == content.split(b"\n")[:-1]
