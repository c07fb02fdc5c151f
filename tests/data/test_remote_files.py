"""Corpora at URLs give what the same files give on disk; what a store cannot do is one sentence."""

import bz2
import gzip
import io
import json
import lzma
import sys
from datetime import datetime, timezone

import fsspec
import pytest
import zstandard
from fsspec.implementations.memory import MemoryFileSystem

from megadiff.data import corpus_streams as module
from megadiff.data.corpus_streams import RemotePath, corpus_path, expanded
from megadiff.data.documents import Corpus, sample
from megadiff.data.preprocess import preprocess
from megadiff.data.shards.finish import merge, report_of
from megadiff.data.shards.ledger import Ledger
from megadiff.data.shards.work import make_shards
from megadiff.errors import DataError
from tests.data.shards.corpus import FRAMING, UNIT_BYTES, contents, write_files, write_serial
from tests.support.forked_command import call_forked

TEXTS = [f"née {n}" for n in range(500)]
CHANGED = r"b\.jsonl: changed since .*: wanted ([\d,]+ bytes) of created 20.*, found \1 of created 20"
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def in_tables():
    import pyarrow
    import pyarrow.parquet

    table, parquet, arrow = pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS}), io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet, row_group_size=90)
    with pyarrow.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    return {"a.parquet": parquet.getvalue(), "a.arrow": arrow.getvalue()}


FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.ndjson.bz2": bz2.compress(LINES),
    "a.json.xz": lzma.compress(LINES),
    "a.csv": b"n,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(TEXTS)).encode(),
    "a.txt": "\n".join(TEXTS).encode(),
}


class Store(MemoryFileSystem):
    """The store in memory, in which files that are open at the same time have places of their own, as elsewhere."""

    protocol = "store"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("store://", "memory://"))

    def _open(self, path, *arguments, **options):
        return io.BytesIO(super()._open(path, *arguments, **options).getvalue())


@pytest.fixture
def store():
    """An empty store in memory, as a function that writes files to it."""
    fsspec.register_implementation("store", Store, clobber=True)
    files = MemoryFileSystem()

    def write(**content):
        for name, value in content.items():
            files.pipe(f"/{name}", value)

    yield write
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def copied(store, files):
    """Put files into the store; return their URLs."""
    store(**{f"corpus/{file.name}": file.read_bytes() for file in files})
    return [f"store://corpus/{file.name}" for file in files]


@pytest.mark.parametrize("name", [*FILES, "a.parquet", "a.arrow"])
def test_every_kind_gives_what_it_gives_on_disk(tmp_path, store, name):
    content = FILES[name] if name in FILES else in_tables()[name]
    (tmp_path / name).write_bytes(content)
    store(**{name: content})
    options = {"text_split": "line"} if name == "a.txt" else {}
    local, remote = Corpus([tmp_path / name], **options), Corpus([f"memory://{name}"], **options)
    assert list(remote.documents()) == list(local.documents()) == TEXTS
    assert remote.report == local.report
    assert remote.total_bytes == local.total_bytes == len(content)
    assert sample(remote) == TEXTS


def test_patterns_and_folders_are_expanded_as_on_disk(tmp_path, store):
    names = ("b/2.jsonl", "b/1.txt.xz", "b/readme.md", "b/.hidden.jsonl", "b/_tmp/x.txt", "a.jsonl", "c.jsonl")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
        store(**{f"top/{name}": b"x"})
    for given in (["b"], ["?.jsonl"], ["**/*.jsonl"], ["b/*"], ["a.jsonl", "c.jsonl"]):
        local = [path.relative_to(tmp_path).as_posix() for path in expanded(tmp_path / word for word in given)]
        remote = expanded(f"memory://top/{word}" for word in given)
        seen = [str(path).removeprefix("memory://").removeprefix("/").removeprefix("top/") for path in remote]
        assert [name for name in seen if ".hidden" not in name] == local
    assert [path.name for path in expanded(["memory://top", "-"])] == ["a.jsonl", "1.txt.xz", "2.jsonl", "c.jsonl", "-"]
    for given, said in (
        ("memory://top/*.csv", r"memory://top/\*\.csv: no file matches; check the path after --input"),
        ("memory://top/b/_tmp", None),
        ("memory://empty", None),
    ):
        if said is None:
            expanded([given])
        else:
            with pytest.raises(DataError, match=said):
                expanded([given])


def test_a_saved_dataset_is_its_listed_files(store):
    table = in_tables()["a.arrow"]
    listed = json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}).encode()
    store(**{"d/train/data-0.arrow": table, "d/train/cache-1.arrow": table, "d/train/state.json": listed})
    store(**{"d/dataset_dict.json": b"{}", "d/train/dataset_info.json": b"{}"})
    found = expanded(["memory://d/train"])
    assert [str(path) for path in found] == ["memory://d/train/data-0.arrow"]
    assert list(Corpus(found).documents()) == TEXTS
    with pytest.raises(DataError, match=r"wanted one split of a dataset, found a folder .*; name one of .*d/train$"):
        expanded(["memory://d"])
    store(**{"d/train/state.json": b"[]"})
    with pytest.raises(DataError, match=r"d/train/state\.json: wanted the names of a dataset's files"):
        expanded(["memory://d/train"])


def test_one_process_writes_the_bytes_that_local_files_give(tmp_path, store):
    files = write_files(tmp_path)
    serial = write_serial(files, tmp_path / "serial")
    preprocess(Corpus(copied(store, files)), tmp_path / "remote", "byte", framing=FRAMING, workers=2)
    assert contents(tmp_path / "remote") == serial


def test_shards_of_urls_are_cut_and_merge_to_the_serial_bytes(tmp_path, store):
    files, folder = write_files(tmp_path), tmp_path / "shards"
    serial = write_serial(files, tmp_path / "serial")
    urls = copied(store, files)
    make_shards(Corpus(urls), folder, "byte", framing=FRAMING, unit_bytes=UNIT_BYTES)
    merge(folder, tmp_path / "merged")
    assert contents(tmp_path / "merged") == serial
    plan = Ledger(folder).plan()
    assert [file.path for file in plan.inputs] == urls
    assert sum(unit.end is not None for unit in plan.units) > 5
    corpus = Corpus(urls)
    list(corpus.documents())
    assert report_of(folder).files == corpus.report.files


def test_worker_processes_share_the_units_of_urls(tmp_path):
    files, folder = write_files(tmp_path), tmp_path / "shards"
    serial = write_serial(files, tmp_path / "serial")
    urls = [f"file://{file}" for file in files]
    make_shards(Corpus(urls), folder, "byte", framing=FRAMING, unit_bytes=UNIT_BYTES, workers=2)
    merge(folder, tmp_path / "merged")
    assert contents(tmp_path / "merged") == serial


def test_a_remote_file_that_changes_under_a_ledger_is_refused(tmp_path, store):
    urls, folder = copied(store, write_files(tmp_path)), tmp_path / "shards"
    make_shards(Corpus(urls), folder, "byte", unit_bytes=UNIT_BYTES)
    make_shards(Corpus(urls), folder, "byte", unit_bytes=UNIT_BYTES)
    planned = Ledger(folder).plan().inputs[1]
    assert planned.mtime_ns is None
    assert planned.version is not None
    assert planned.version.startswith("created 20")
    store(**{"corpus/b.jsonl": MemoryFileSystem().cat("/corpus/b.jsonl")})
    with pytest.raises(DataError, match=CHANGED):
        make_shards(Corpus(urls), folder, "byte", unit_bytes=UNIT_BYTES)
    units = Ledger(folder).plan().units
    with pytest.raises(DataError, match=r"b\.jsonl: changed since .* was begun"):
        Ledger(folder).plan().refuse_changed(next(unit for unit in units if unit.first == 1), folder)


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ({"ETag": '"1b2c"', "LastModified": datetime(2026, 1, 2, tzinfo=timezone.utc)}, "ETag 1b2c"),
        ({"etag": "CJ=", "updated": "2026-01-02"}, "etag CJ="),
        ({"blob_id": "e69de2", "last_commit": None}, "blob_id e69de2"),
        ({"LastModified": datetime(2026, 1, 2, tzinfo=timezone.utc)}, "LastModified 2026-01-02T00:00:00+00:00"),
        ({"ETag": None, "mtime": 1.5}, "mtime 1.5"),
        ({}, None),
    ],
)
def test_a_version_is_the_surest_value_that_a_store_gives(info, version):
    assert module._facts_of({"size": 3, "type": "file", **info}) == module.RemoteFacts(False, 3, version)


def test_the_commands_read_urls(tmp_path, store):
    files = write_files(tmp_path)
    urls = copied(store, files)
    words = ["--tokenizer", "byte", "--append-eod", "--output-prefix", tmp_path / "p"]
    ended = call_forked("tools/preprocess_data.py", "--input", "memory://corpus", *words)
    assert (ended.code, ended.err) == (0, "")
    assert f"{urls[1].replace('store://', 'memory:///')}: 6 document(s) read" in ended.out
    assert contents(tmp_path / "p") == write_serial(files, tmp_path / "serial")
    words = ["--output", tmp_path / "t", "--vocab-size", "270"]
    ended = call_forked("tools/train_tokenizer.py", "--input", "memory://corpus/*.jsonl", *words)
    assert (ended.code, ended.err) == (0, "")
    assert (tmp_path / "t/tokenizer.json").is_file()


class Failing(MemoryFileSystem):
    """A store whose files fail after some bytes, with an exception that is no OSError."""

    protocol = "failing"

    def _open(self, *arguments, **options):
        file = io.BytesIO(LINES)

        class File(io.BytesIO):
            def readinto(self, buffer):
                if file.tell():
                    raise RuntimeError("connection reset\nby peer")
                return file.readinto(memoryview(buffer)[:100])

        return File()

    def info(self, path, **options):
        if "denied" in path:
            raise PermissionError("403: denied")
        size = None if "unsized" in path else len(LINES)
        return {"name": path, "type": "file", "size": size}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://none.jsonl", r"memory://none\.jsonl: no such file; check the path after --input"),
        ("memory://a.doc", r"memory://a\.doc: wanted a name that ends in one of \.jsonl"),
        ("s3://bucket/a.jsonl", r"reading s3:// needs one more package \(.*s3fs.*\); pip install 'megadiff\[fsspec\]'"),
        ("sthree://bucket/a.jsonl", r"sthree://bucket/a\.jsonl: fsspec cannot read it \(.*sthree.*\); write for exam"),
        (
            "failing://denied.jsonl",
            r"denied\.jsonl: cannot be read \(403: denied\); check the address, the n",
        ),
        ("failing://a.jsonl", r"failing://a\.jsonl: reading failed \(connection reset\); check the disk or the store"),
    ],
)
@pytest.mark.parametrize("output", ["--output-prefix", "--shards"])
def test_what_a_store_cannot_give_is_one_sentence(tmp_path, store, monkeypatch, url, said, output):
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    store(**{"a.doc": b"x"})

    def make():
        corpus = Corpus(expanded([url]))
        if output == "--shards":
            make_shards(corpus, tmp_path / "s", "byte")
        else:
            preprocess(corpus, tmp_path / "p", "byte")

    with pytest.raises(DataError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("p.*"))


def test_a_file_of_unknown_size_is_read_serially_alone(tmp_path, store):
    fsspec.register_implementation("failing", Failing, clobber=True)
    corpus = Corpus(["failing://unsized.jsonl"])
    assert corpus.total_bytes == 0
    with pytest.raises(DataError, match=r"wanted a file of known size for --shards, found none; use --output-prefix"):
        make_shards(corpus, tmp_path / "s", "byte")


def test_without_fsspec_the_pip_line_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    words = ["--input", "s3://bucket/*.jsonl", "--tokenizer", "byte", "--output-prefix", tmp_path / "p"]
    ended = call_forked("tools/preprocess_data.py", *words)
    wanted = "s3://bucket/*.jsonl: reading s3:// needs fsspec; pip install 'megadiff[fsspec]'"
    assert (ended.code, ended.err) == (2, f"error: {wanted}\n")


def test_urls_and_paths_are_told_apart():
    assert isinstance(corpus_path("hf://datasets/a/b/c.parquet"), RemotePath)
    assert isinstance(corpus_path("simplecache::s3://a/b.jsonl"), RemotePath)
    assert not isinstance(corpus_path("corpus/a.jsonl"), RemotePath)
    web = RemotePath("https://example.org/x/a.jsonl.gz?download=true")
    assert (web.name, web.suffix) == ("a.jsonl.gz", ".gz")
    assert len({RemotePath("s3://a/b"), RemotePath("s3://a/b"), RemotePath("s3://a/c")}) == 2
