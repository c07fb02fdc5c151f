import gzip
import hashlib
import json
import random
import resource
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data import corpus_files, documents
from megadiff.data.corpus_files import Line, TextFields
from megadiff.data.documents import Corpus
from megadiff.errors import DataError
from tests.security.children import in_child

LINES = [{"text": "one"}, {"text": "two\nlines"}, {"text": "drei €"}]
JSONL = "".join(json.dumps(line) + "\n" for line in LINES).encode()
TEXTS = [line["text"] for line in LINES]
ZST = zstandard.ZstdCompressor(write_checksum=True).compress(JSONL)
"""As the zstd command writes it; without a checksum a flipped bit may be undetectable."""

TEXT = TextFields(("text",))


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
    "a quoted list": (b'{"text": ["x"]}', r"`text` must be a string, found a list"),
    "a byte-order mark inside": (b'\xef\xbb\xbf{"text": "x"}', r"not a JSON object"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_refused_with_its_number_or_skipped_and_listed(tmp_path, kind):
    line, reason = BAD_LINES[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "after"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {reason}.*; correct the line or raise --max-bad-lines"):
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
    monkeypatch.setattr(corpus_files, "CHUNK_BYTES", 7)
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


LATIN = "Erste Zeile\nzweite\nHäuser\n\nvierte\n".encode("latin-1")


@pytest.mark.parametrize("split", documents.TEXT_SPLITS)
def test_a_byte_that_is_no_utf8_is_named_with_what_to_do(tmp_path, split):
    path = tmp_path / "a.txt"
    path.write_bytes(LATIN)
    wanted = r"a\.txt:3: invalid UTF-8 at byte 20 of the file \(0xe4\); convert the file \(for example iconv -f latin1"
    with pytest.raises(DataError, match=wanted):
        read(path, text_split=split)
    path.with_suffix(".jsonl").write_bytes(b'{"text": "a"}\n{"text": "b\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: invalid UTF-8 at byte 11 of the line \(0xff\); convert the file"):
        read(path.with_suffix(".jsonl"))


def test_a_utf16_file_is_recognised(tmp_path):
    (tmp_path / "a.txt").write_bytes("häuser\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.txt:1: invalid UTF-8 at byte 0 of the file \(0xff\); .*iconv -f utf-16"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("split", "kept"),
    [
        ("file", ["Erste Zeile\nzweite\n\nvierte\n"]),
        ("line", ["Erste Zeile", "zweite", "vierte"]),
        ("blank-line", ["vierte"]),
    ],
)
def test_a_tolerated_byte_costs_its_line_or_document_and_not_the_file(tmp_path, split, kept):
    (tmp_path / "a.txt").write_bytes(LATIN)
    texts, report = read(tmp_path / "a.txt", text_split=split, max_bad_lines=1)
    assert (texts, report.bad_lines) == (kept, 1)
    assert report.bad_examples == [f"{tmp_path}/a.txt:3: invalid UTF-8 at byte 20 of the file (0xe4)"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LATIN)
    texts, report = read(tmp_path / "a.txt", text_split=split, max_bad_lines=1)
    assert (texts, report.bad_examples[0].partition(": ")[2]) == (kept, "invalid UTF-8 at byte 23 of the file (0xe4)")


POEM = b"\xef\xbb\xbf one\r\ntwo \r\n\r\n \t\r\n\r\nthree\r\n\r\n\r\nfour\r\nfive"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk", [1, 3, 2**20])
@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("file", [POEM[3:].decode()]),
        ("line", [" one", "two ", "three", "four", "five"]),
        ("blank-line", [" one\r\ntwo ", "three", "four\r\nfive"]),
    ],
)
def test_a_text_file_is_cut_as_asked(tmp_path, monkeypatch, split, wanted, chunk, suffix):
    monkeypatch.setattr(corpus_files, "CHUNK_BYTES", chunk)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](POEM))
    corpus = Corpus([path, path], text_split=split)
    assert list(corpus.documents()) == wanted * 2
    assert [file.documents for file in corpus.report.files] == [len(wanted)] * 2
    assert corpus.report.documents == 2 * len(wanted)
    lines = {"file": [1], "line": [1, 2, 6, 9, 10], "blank-line": [1, 6, 9]}[split]
    assert [document.line for document in corpus.located_documents()] == lines * 2
    assert [document.number for document in corpus.located_documents()] == [*range(1, len(wanted) + 1)] * 2


def test_a_text_beyond_the_bound_is_a_bad_line_however_it_is_cut(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\n" + b"x" * 60 + b"\n\nb\nc\n" + b"y\n" * 40 + b"\nd")
    found = {}
    for split in documents.TEXT_SPLITS:
        texts, report = read(tmp_path / "a.txt", text_split=split, max_bad_lines=2, max_document_bytes=50)
        found[split] = (texts[:2], len(texts), [e.split(": ")[0].rpartition(":")[2] for e in report.bad_examples])
    assert found == {"file": ([], 0, ["1"]), "line": (["a", "b"], 44, ["2"]), "blank-line": (["d"], 1, ["2", "4"])}
    with pytest.raises(DataError, match=r"is longer than 50 bytes .*; cut it into documents with --text-split line or"):
        read(tmp_path / "a.txt", max_document_bytes=50)


def test_an_unknown_way_to_cut_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"--text-split must be one of file, line, blank-line; found `paragraph`"):
        Corpus([tmp_path / "a.txt"], text_split="paragraph")


def test_wrong_paths_are_refused_before_reading(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        Corpus([tmp_path / "no.jsonl"])
    with pytest.raises(DataError, match=r"wanted a file, found a folder; name its files, for example .*/\*\.jsonl"):
        Corpus([tmp_path])
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(DataError, match=r"a\.doc: wanted a name that ends in one of \.jsonl"):
        Corpus([tmp_path / "a.doc"])
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


PYTHON_LINES = {
    "NaN": ('{"text": "a", "score": NaN}', "a"),
    "Infinity": ('{"x": [Infinity, -Infinity], "text": "a"}', "a"),
    "beyond a double": ('{"text": "a", "x": 1e400, "y": -1E999}', "a"),
    "a big integer": ('{"text": "a", "x": 1180591620717411303424, "y": ' + "9" * 5000 + "}", "a"),
    "twice the key": ('{"text": 1, "text": "a", "text": "b"}', "b"),
    "half a pair elsewhere": (r'{"text": "a", "x": "\ud83d"}', "a"),
    "half a pair in a key": (r'{"text": "a", "\udc00": 1}', "a"),
    "half a pair": (r'{"text": "a\ud83d \udc00b"}', "a\ufffd \ufffdb"),
    "a pair": (r'{"text": "\ud83d\ude00", "x": NaN}', "\U0001f600"),
    "deep beside the text": ('{"x": ' + "[" * 5000 + "]" * 5000 + ', "text": "a"}', "a"),
    "escaped slashes": (r'{"text":"a\/b","x":null}', "a/b"),
    "space around": (' \t{"text": "a", "x": NaN} \r', "a"),
}


@pytest.fixture(params=[True, False], ids=["orjson", "json"])
def parser(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(corpus_files, "orjson", None)


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("kind", PYTHON_LINES)
def test_what_python_writes_is_read(tmp_path, kind):
    line, text = PYTHON_LINES[kind]
    (tmp_path / "a.jsonl").write_text(line + "\n")
    texts, report = read(tmp_path / "a.jsonl")
    assert (texts, report.repaired_documents) == ([text], kind == "half a pair")


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_line_is_bad_for_the_same_reason_without_orjson(tmp_path, kind):
    line, reason = BAD_LINES[kind]
    (tmp_path / "a.jsonl").write_bytes(b"\n" + line)
    with pytest.raises(DataError, match=reason):
        read(tmp_path / "a.jsonl")


def test_a_frame_written_by_pandas_is_read(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas comes with the evaluation harness only")
    frame = pandas.DataFrame({"text": ["a/b", "ü \U0001f600\n"], "score": [float("nan"), float("inf")]})
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    assert read(tmp_path / "a.jsonl")[0] == ["a/b", "ü \U0001f600\n"]
    frame.to_json(tmp_path / "b.json", orient="records")
    with pytest.raises(DataError, match=r"found a list; write one object a line \(in pandas: orient='records', lines="):
        read(tmp_path / "b.json")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(record=st.dictionaries(st.text(max_size=4), values, max_size=4), text=st.text(max_size=8), ascii=st.booleans())
def test_both_parsers_read_the_same_of_anything_python_writes(record, text, ascii):
    """Also of a line that is cut down to its top level while it is read."""
    pairs = [*record.items(), ("text", text)]
    content = json.dumps(dict(pairs), ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    line = Line(content, len(content))
    reduced = Line(corpus_files.TopLevel()(content), len(content))
    with pytest.MonkeyPatch.context() as patch:
        first = corpus_files.text_of(line, TEXT), corpus_files.text_of(reduced, TEXT)
        patch.setattr(corpus_files, "orjson", None)
        second = corpus_files.text_of(line, TEXT), corpus_files.text_of(reduced, TEXT)
    assert first == second
    if ascii:
        assert first == (corpus_files.Text(text),) * 2


def top_level(value):
    """Return what is left of a value whose nested containers lose their contents."""
    return {key: type(part)() if isinstance(part, (list, dict)) else part for key, part in value.items()}


@settings(max_examples=200, deadline=None)
@given(record=st.dictionaries(st.text(max_size=4), values, max_size=5), size=st.integers(1, 30))
def test_a_long_line_keeps_its_top_level_however_the_bytes_come(record, size):
    content = json.dumps(record).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "LONG_LINE_BYTES", 3)
        chunks = [content[i : i + size] for i in range(0, len(content), size)]
        (line,) = corpus_files.split_json_lines([*chunks, b"\n"], limit=10**6)
    assert line.num_bytes == len(content)
    kept = json.dumps(top_level(record))
    assert json.dumps(json.loads(line.content)) == (kept if len(content) > 3 else json.dumps(record))


def test_time_and_memory_of_a_long_line_grow_with_its_text_alone(tmp_path):
    """Each byte is handed on a bounded number of times, in tiny blocks as well, and nothing nested is kept."""

    def peak(path, suffix, foreign, block):
        content = b'{"text": "' + b"x" * 2**20 + b'", "x": [' + b"[]," * foreign + b"{}]}\n"
        packer = zstandard.ZstdCompressor().compressobj()
        with open(path, "wb") as file:
            for start in range(0, len(content), block):
                part = content[start : start + block]
                file.write(packer.compress(part) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) if suffix else part)
            file.write(packer.flush() if suffix else b"")
        tracemalloc.start()
        assert [len(text) for text in read(path)[0]] == [2**20]
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small = peak(tmp_path / "small.jsonl", "", 10, 2**20)
    assert peak(tmp_path / "foreign.jsonl", "", 4_000_000, 2**20) < small + 2**25
    assert peak(tmp_path / "blocks.jsonl.zst", ".zst", 1_000_000, 1000) < small + 2**25


def test_a_line_in_tiny_pieces_is_joined_in_linear_time():
    """The number of bytes copied is counted: every chunk is sliced and joined a bounded number of times."""

    class Counted(bytes):
        copied = 0

        def split(self, *arguments):
            Counted.copied += len(self)
            return super().split(*arguments)

    pieces = [Counted(b"y" * 50) for _ in range(20_000)]
    (line,) = corpus_files.split_lines(pieces, limit=10**7)
    assert (line.num_bytes, Counted.copied) == (10**6, 10**6)
    assert sum(len(chunk) for chunk in corpus_files.even_chunks([b"y" * 50] * 100_000)) == 5_000_000
    assert {len(chunk) for chunk in corpus_files.even_chunks([b"y" * 3_000_000] * 7)} == {2**20, 21_000_000 % 2**20}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text()), st.integers(1, 40))
def test_lines_do_not_depend_on_how_the_bytes_come(texts, chunk):
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    chunks = [content[i : i + chunk] for i in range(0, len(content), chunk)]
    found = list(corpus_files.split_lines(chunks, limit=10**6))
    assert found == [Line(line, len(line)) for line in content.split(b"\n")[:-1]]
