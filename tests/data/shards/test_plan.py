"""Units follow from the inputs alone, and a folder begun for other inputs or options is refused."""

import os

import pytest

from megadiff.data.documents import Corpus
from megadiff.data.preprocess import DocumentMarkers
from megadiff.data.shards.plan import make_plan
from megadiff.data.shards.work import make_shards
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.shards.corpus import FRAMING, UNIT_BYTES, write_files


def planned(files, unit_bytes=UNIT_BYTES, **options):
    return make_plan(Corpus(files, **options), ByteTokenizer(), FRAMING, unit_bytes=unit_bytes)


def test_ranges_cover_a_file_once_and_begin_at_lines(tmp_path):
    files = write_files(tmp_path)
    plan = planned(files)
    content = files[0].read_bytes()
    ranges = [(unit.start, unit.end) for unit in plan.units if unit.end is not None and unit.first == 0]
    assert len(ranges) == -(-len(content) // UNIT_BYTES)
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == len(content)
    assert all(content[start - 1 : start] == b"\n" for start, _ in ranges[1:])


def test_small_and_compressed_files_are_joined_up_to_a_unit(tmp_path):
    plan = planned(write_files(tmp_path))
    whole = [(unit.first, unit.count) for unit in plan.units if unit.end is None]
    assert whole == [(1, 4)], "the long line of the last file makes it a file that is cut"
    assert sum(plan.bytes_of(unit) for unit in plan.units) == sum(file.bytes for file in plan.inputs)
    tiny = planned(write_files(tmp_path), unit_bytes=100)
    assert [(unit.first, unit.count) for unit in tiny.units if unit.end is None] == [(2, 1), (3, 1), (4, 1)]


def test_a_line_longer_than_a_unit_is_never_cut(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "' + "x" * 500 + '"}\n{"text": "y"}')
    assert [(unit.start, unit.end) for unit in planned([file], 100).units] == [(0, 513), (513, 526)]


def test_text_files_are_cut_only_where_each_line_is_a_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n" * 100)
    assert len(planned([file], 100).units) == 1
    assert len(planned([file], 100, text_split="blank-line").units) == 1
    assert len(planned([file], 100, text_split="line").units) == 8


def test_other_inputs_under_a_ledger_are_refused(tmp_path):
    files, folder = write_files(tmp_path), tmp_path / "shards"
    make_shards(Corpus(files), folder, "byte", unit_bytes=UNIT_BYTES)
    before = sorted(folder.rglob("*"))

    def refused(files, said, tokenizer="byte", framing=None, unit_bytes=UNIT_BYTES, **options):
        with pytest.raises(DataError, match=said) as caught:
            make_shards(Corpus(files, **options), folder, tokenizer, framing=framing, unit_bytes=unit_bytes)
        assert "\n" not in str(caught.value)
        assert sorted(folder.rglob("*")) == before

    refused(files[::-1], r"wanted .*a\.jsonl, with which it was begun, found .*f\.jsonl in its place")
    refused(files[:5], r"wanted the 6 input files that it was begun with, found 5; give the same files")
    refused(files, r"wanted --append-eod as it was begun, False, found True; repeat", framing=FRAMING)
    refused(files, r"wanted --unit-mb as it was begun, 4000, found 4001; repeat", unit_bytes=4001)
    refused(files, r"wanted --json-key as it was begun, text, found other; repeat", json_key="other")
    os.utime(files[1], ns=(1, 1))
    refused(files, r"b\.jsonl: changed since .*shards was begun: wanted .* bytes of .*, found .* bytes of 1970-01-01")
    files[1].write_text("")
    refused(files, r"b\.jsonl: changed since .*shards was begun: .* found 0 bytes of .*; restore the file or give")


def test_two_tokenizers_in_one_folder_are_refused(tmp_path):
    from megadiff.data.tokenizer_training import train_tokenizer

    files, folder = write_files(tmp_path), tmp_path / "shards"
    make_shards(Corpus(files), folder, "byte", unit_bytes=UNIT_BYTES)
    train_tokenizer(["the quick brown fox " * 30], tmp_path / "tok", kind="bpe", vocab_size=270)
    with pytest.raises(DataError, match=r"wanted the tokenizer that it was begun with, byte \(\w{12}\), found hf_json"):
        make_shards(Corpus(files), folder, tmp_path / "tok", unit_bytes=UNIT_BYTES)


def test_what_is_no_folder_of_shards_is_left_alone(tmp_path):
    files, folder = write_files(tmp_path), tmp_path / "other"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"wanted a new folder or one with plan\.json, found a folder with other"):
        make_shards(Corpus(files), folder, "byte")
    (folder / "mine.txt").rename(folder / "plan.json")
    with pytest.raises(DataError, match=r"plan\.json: the plan is not JSON .*; remove the folder and begin again"):
        make_shards(Corpus(files), folder, "byte")
    assert os.listdir(folder) == ["plan.json"]


def test_a_pipe_cannot_be_cut_into_units(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: wanted a plain file for --shards, found a pipe"):
        make_plan(Corpus([tmp_path / "a.jsonl"]), ByteTokenizer(), DocumentMarkers(), unit_bytes=1)
