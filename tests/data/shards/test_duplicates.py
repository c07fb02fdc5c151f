"""Repeated documents are left out within and across units, whoever makes these, and the first one is kept."""

import json
import os
import random

import pytest

from megadiff.data.document_filters import DocumentFilters
from megadiff.data.documents import Corpus
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.shards import duplicates as module
from megadiff.data.shards.finish import finish, merge, report_of
from megadiff.data.shards.ledger import Ledger
from megadiff.data.shards.pool import make_shards
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.shards.corpus import contents
from tests.data.shards.test_pool import FORK
from tests.support.forked_command import call_forked


@pytest.fixture
def files(tmp_path):
    """Two files in which most texts occur several times, in both of them."""
    draw = random.Random(6)
    texts = [f"née {draw.randint(0, 300)}" for _ in range(900)] + [""]
    for name, part in (("a", texts[:600]), ("b", texts[600:])):
        lines = [json.dumps({"text": text}) for text in part]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]


def texts_of(folder):
    reader, tokenizer = IndexedReader(folder), ByteTokenizer()
    return [tokenizer.decode(reader.document(i)) for i in range(reader.num_documents)]


def first_ones(files, **filters):
    return list(dict.fromkeys(Corpus(files, filters=DocumentFilters(**filters)).documents()))


@pytest.mark.parametrize("unit_bytes", [700, 10**6])
@pytest.mark.parametrize("group_bytes", [2000, 2**32])
def test_the_first_of_equal_documents_is_kept(tmp_path, files, unit_bytes, group_bytes, monkeypatch):
    monkeypatch.setattr(module, "_GROUP_BYTES", group_bytes)
    folder = tmp_path / "shards"
    make_shards(Corpus(files), folder, "byte", unit_bytes=unit_bytes, drop_duplicates=True)
    finish(folder)
    wanted = first_ones(files)
    assert texts_of(folder) == wanted
    report = report_of(folder)
    assert (report.documents, report.duplicates, report.empty_documents) == (len(wanted), 900 - len(wanted), 1)
    assert sorted(os.listdir(folder)) == ["plan.json", "shards", "tokens.idx", "tokens.json"]


def test_units_that_are_shared_give_the_same_bytes(tmp_path, files):
    make_shards(Corpus(files), tmp_path / "one", "byte", unit_bytes=10**6, drop_duplicates=True)
    merge(tmp_path / "one", tmp_path / "merged-one")

    def make():
        make_shards(Corpus(files), tmp_path / "many", "byte", unit_bytes=1000, drop_duplicates=True)

    processes = [FORK.Process(target=make) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    merge(tmp_path / "many", tmp_path / "merged-many")
    assert contents(tmp_path / "merged-one") == contents(tmp_path / "merged-many")


def test_a_shard_that_is_made_again_later_is_the_same(tmp_path, files):
    folder = tmp_path / "shards"
    corpus = Corpus(files)
    make_shards(corpus, folder, "byte", unit_bytes=3000, drop_duplicates=True)
    finish(folder)
    before = (folder / "shards/000002/tokens.bin").read_bytes()
    (folder / "shards/000002").rename(tmp_path / "gone")
    make_shards(corpus, folder, "byte", unit_bytes=3000, drop_duplicates=True)
    assert (folder / "shards/000002/tokens.bin").read_bytes() == before


def test_duplicates_are_counted_after_the_other_filters(tmp_path, files):
    filters = {"valid_fraction": 0.3, "split": "valid", "min_characters": 6}
    corpus = Corpus(files, filters=DocumentFilters(**filters))
    make_shards(corpus, tmp_path / "shards", "byte", unit_bytes=3000, drop_duplicates=True)
    finish(tmp_path / "shards")
    wanted = first_ones(files, **filters)
    assert texts_of(tmp_path / "shards") == wanted
    list(corpus.documents())
    report = report_of(tmp_path / "shards")
    assert report.duplicates == corpus.report.documents - len(wanted)
    assert (report.other_split, report.too_short) == (corpus.report.other_split, corpus.report.too_short)
    with pytest.raises(DataError, match=r"wanted --split as it was begun, valid, found train; repeat the command"):
        make_shards(Corpus(files, filters=DocumentFilters(valid_fraction=0.3, min_characters=6)), tmp_path / "shards",
                    "byte", unit_bytes=3000, drop_duplicates=True)  # fmt: skip


def test_damaged_digests_are_refused(tmp_path, files):
    corpus, folder = Corpus(files), tmp_path / "shards"
    make_shards(corpus, folder, "byte", unit_bytes=3000, drop_duplicates=True)
    (folder / "shards/000001").rename(tmp_path / "gone")
    for digests in Ledger(folder).digests_folder.iterdir():
        digests.write_bytes(b"x")
    for repeats in Ledger(folder).repeats_folder.iterdir():
        repeats.unlink()
    with pytest.raises(DataError, match=r"digests/\d+: cut short or damaged; remove the file and repeat the command"):
        make_shards(corpus, folder, "byte", unit_bytes=3000, drop_duplicates=True)


def test_the_command_drops_duplicates(tmp_path, files):
    words = ["--input", *files, "--tokenizer", "byte", "--drop-duplicates"]
    ended = call_forked("tools/preprocess_data.py", *words, "--shards", tmp_path / "s", "--unit-mb", "0.003")
    assert ended.code == 0
    assert ended.err == f"left out {900 - len(first_ones(files))} document(s) that repeat an earlier one\n"
    assert texts_of(tmp_path / "s") == first_ones(files)
    refused = call_forked("tools/preprocess_data.py", *words, "--output-prefix", tmp_path / "p")
    assert refused.code == 2
    assert "--drop-duplicates has no meaning without --shards" in refused.err
