"""CSV, TSV and Arrow files, and texts made of several columns or keys."""

import csv
import json

import pytest

from megadiff.data.corpus_options import unescaped
from megadiff.data.corpus_streams import expanded
from megadiff.data.documents import Corpus
from megadiff.errors import DataError
from tests.support.forked_command import call_forked

ROWS = [("one, or two", 'a "quoted" text'), ("née", "two\nlines"), ("", ""), ("數", "tab\there")]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_records_are_documents(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
        writer.writerows([("title", "text"), *ROWS])
    corpus = Corpus([path])
    assert list(corpus.documents()) == [text for _, text in ROWS if text]
    assert corpus.report.empty_documents == 1
    assert list(Corpus([path], json_key="title").documents()) == [title for title, _ in ROWS if title]
    with pytest.raises(DataError, match=r"no column `body` \(columns here: title, text\); choose with --json-key"):
        list(Corpus([path], json_key="body").documents())


def test_a_byte_order_mark_and_windows_line_ends_are_dropped(tmp_path):
    (tmp_path / "a.csv").write_bytes("\ufefftext,id\r\none,1\r\n\r\ntwo,2\r\n".encode())
    assert list(Corpus([tmp_path / "a.csv"]).documents()) == ["one", "two"]


def test_a_quote_without_its_end_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"open\n' + "more\n" * 1000)
    with pytest.raises(DataError, match=r"a\.csv:\d+: not a record \(field larger than field limit \(500\)\); correct"):
        list(Corpus([tmp_path / "a.csv"], max_document_bytes=500).documents())


def test_bytes_that_are_no_utf8_are_a_bad_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\none\n\xff\ntwo\n")
    with pytest.raises(DataError, match=r"a\.csv:3: invalid UTF-8 at byte 9 of the file \(0xff\)"):
        list(Corpus([tmp_path / "a.csv"]).documents())
    assert list(Corpus([tmp_path / "a.csv"], max_bad_lines=1).documents()) == ["one", "two"]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_rows_are_documents(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"title": [title for title, _ in ROWS], "text": [text for _, text in ROWS]})
    path = tmp_path / "data-00000-of-00001.arrow"
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    assert list(Corpus([path]).documents()) == [text for _, text in ROWS if text]
    with pytest.raises(DataError, match=r"no column `body` \(columns here: title, text\)"):
        list(Corpus([path], json_key="body").documents())
    path.write_bytes(path.read_bytes()[:-150])
    with pytest.raises(DataError, match=r"the arrow file is cut or damaged"):
        list(Corpus([path]).documents())


def test_a_folder_that_datasets_has_saved_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": [text for _, text in ROWS]})
    made.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    (tmp_path / "saved/cache-1.arrow").write_bytes(b"left by a map of its user")
    ended = call_forked(
        "tools/preprocess_data.py", "--input", tmp_path / "saved", "--tokenizer", "byte",
        "--output-prefix", tmp_path / "p",
    )  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert "wrote" in ended.out
    assert ": 3 documents" in ended.out
    datasets.DatasetDict(train=made, test=made).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"found a folder of several; name one of .*both/test, .*both/train"):
        expanded([tmp_path / "both"])
    assert [path.name for path in expanded([tmp_path / "both/test"])] == ["data-00000-of-00001.arrow"]
    (tmp_path / "saved/state.json").write_text('{"_data_files": [{"filename": "../other.arrow"}]}')
    with pytest.raises(DataError, match=r"state\.json: wanted the names of a dataset's files"):
        expanded([tmp_path / "saved"])


def test_a_template_joins_fields_of_every_kind_of_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"title": title, "text": text, "id": 3} for title, text in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("title", "text"), *ROWS])
    template = unescaped(r"# {title}\n\n{text}{{}}")
    wanted = [f"# {title}\n\n{text}{{}}" for title, text in ROWS]
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        assert list(Corpus([tmp_path / name], template=template).documents()) == wanted
    with pytest.raises(DataError, match=r"a\.jsonl:1: `id` must be a string, found a number"):
        list(Corpus([tmp_path / "a.jsonl"], template="{text}{id}").documents())
    with pytest.raises(DataError, match=r"no column `url` \(columns here: .*\); choose with --template"):
        list(Corpus([tmp_path / "a.parquet"], template="{url}{text}").documents())
    with pytest.raises(DataError, match=r"no key `url` \(keys here: title, text, id; choose with --template\)"):
        list(Corpus([tmp_path / "a.jsonl"], template="{url}{text}").documents())


@pytest.mark.parametrize("template", ["", "text", "{}", "{0.x}", "{a[1]}", "{a!r}", "{a:>9}", "{a", "a}"])
def test_a_template_holds_names_of_fields_and_nothing_else(tmp_path, template):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"--template .*; write for example '\{title\}\\n\\n\{text\}'"):
        Corpus([tmp_path / "a.jsonl"], template=template)
