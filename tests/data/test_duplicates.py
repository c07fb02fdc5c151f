"""Repeated documents are left out within and across units, whoever makes these, and the first one is kept."""

import errno
import json
import os
import random
import resource

import numpy as np
import pytest

from megadiff.data import duplicates as module
from megadiff.data import preprocess as preprocess_module
from megadiff.data.documents import Corpus, DocumentFilters
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.preprocess import preprocess
from megadiff.data.shards.finish import finish, merge, report_of
from megadiff.data.shards.ledger import Ledger
from megadiff.data.shards.work import make_shards
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.shards.corpus import contents
from tests.data.shards.test_pool import FORK
from tests.support.disk import watched_disk
from tests.support.forked_command import call_forked

DUPLICATES = int(os.environ.get("MEGADIFF_DUPLICATE_DOCUMENTS", "400000"))


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
@pytest.mark.parametrize(("group", "run"), [(50, 2**20), (2**21, 7), (90, 64)])
def test_the_first_of_equal_documents_is_kept(tmp_path, files, unit_bytes, group, run, monkeypatch):
    monkeypatch.setattr(module, "_GROUP_DOCUMENTS", group)
    monkeypatch.setattr(module, "_RUN_DOCUMENTS", run)
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
    alone = call_forked("tools/preprocess_data.py", *words, "--output-prefix", tmp_path / "p")
    assert (alone.code, alone.err) == (0, ended.err)
    assert alone.out.splitlines()[:-1] == ended.out.splitlines()[:-1]
    assert texts_of(tmp_path / "p") == first_ones(files)


@pytest.mark.parametrize(("group", "run", "workers"), [(50, 7, 1), (2**21, 2**20, 2)])
def test_one_process_writes_what_merged_shards_hold(tmp_path, files, group, run, workers, monkeypatch):
    monkeypatch.setattr(module, "_GROUP_DOCUMENTS", group)
    monkeypatch.setattr(module, "_RUN_DOCUMENTS", run)
    make_shards(Corpus(files), tmp_path / "shards", "byte", unit_bytes=1000, drop_duplicates=True)
    merge(tmp_path / "shards", tmp_path / "merged")
    corpus = Corpus(files)
    (tmp_path / "p.duplicates.tmp").mkdir()
    (tmp_path / "p.duplicates.tmp/old").write_text("left by a killed run")
    done = preprocess(corpus, tmp_path / "p", "byte", workers=workers, drop_duplicates=True)
    assert contents(tmp_path / "p") == contents(tmp_path / "merged")
    assert done.report == report_of(tmp_path / "shards")
    assert not (tmp_path / "p.duplicates.tmp").exists()


def test_what_cannot_be_read_twice_is_refused_for_duplicates(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path, found in (("-", "standard input"), (tmp_path / "a.jsonl", "a pipe")):
        with pytest.raises(DataError, match=f"wanted a file for --drop-duplicates, .*, found {found}; write it to a"):
            preprocess(Corpus([path]), tmp_path / "p", "byte", drop_duplicates=True)


def test_a_file_that_changes_between_both_readings_is_refused(tmp_path, files, monkeypatch):
    find = preprocess_module.find_repeats

    def find_then_change(corpus, folder, show):
        found = find(corpus, folder, show)
        with files[1].open("a") as file:
            file.write('\n{"text": "more"}')
        return found

    monkeypatch.setattr(preprocess_module, "find_repeats", find_then_change)
    with pytest.raises(DataError, match=r"b\.jsonl: changed while it was read; repeat the command when nobody writes"):
        preprocess(Corpus(files), tmp_path / "p", "byte", drop_duplicates=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("name", ["digests", "0000"])
def test_a_full_disk_while_duplicates_are_sought_leaves_no_files(tmp_path, files, name):
    def refuse(what):
        if what.startswith("open") and name in what and ".duplicates.tmp" in what:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with watched_disk(refuse), pytest.raises(DataError, match=r"p\.duplicates\.tmp: writing failed \(No space left"):
        preprocess(Corpus(files), tmp_path / "p", "byte", drop_duplicates=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_more_documents_than_can_be_numbered_are_refused(tmp_path, files, monkeypatch):
    monkeypatch.setattr(module, "_MOST_DOCUMENTS", 100)
    with pytest.raises(DataError, match=r"--drop-duplicates: wanted at most 100 documents, found more; use --shards"):
        preprocess(Corpus(files), tmp_path / "p", "byte", drop_duplicates=True)


def test_numbers_are_the_set_that_was_given():
    draw = random.Random(4)
    wanted = {draw.randrange(3000) for _ in range(400)}
    listed = np.array(sorted(wanted), dtype="<u4")
    found = module.Numbers([listed[:100][::-1], listed[:0], listed[100:]])
    assert [number for number in range(3100) if number in found] == sorted(wanted)
    assert 5 not in module.Numbers([])


class Simulated:
    """A corpus of short texts, a tenth of which repeat an earlier one, without files."""

    def __init__(self, count):
        self.count = count

    def documents(self):
        return (str(number - 7 * (number % 10 == 9)) for number in range(self.count))


def peak_growth(count, connection, folder):
    module._RUN_DOCUMENTS, module._GROUP_DOCUMENTS = count // 16, count // 8
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = module.find_repeats(Simulated(count), folder, lambda: None)
    connection.send(
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sum(n in found for n in range(count)))
    )


def test_memory_for_duplicates_is_that_of_a_run_or_a_group(tmp_path):
    """Digests and numbers of a million documents take 20 MB at once, and 60 MB to sort; here they come in parts."""
    count = DUPLICATES
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=peak_growth, args=(count, theirs, tmp_path / "f"))
    process.start()
    kilobytes, repeats = ours.recv()
    process.join()
    assert repeats == count // 10
    assert kilobytes * 1024 < 30 * count
