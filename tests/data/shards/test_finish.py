"""Shards are together what one process writes: merged, or read as one source where they lie."""

import threading

import numpy as np
import pytest

from megadiff.data.config import DataConfig
from megadiff.data.documents import Corpus
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.open import open_data
from megadiff.data.scan import scan
from megadiff.data.shards import finish as module
from megadiff.data.shards.finish import finish, merge, report_of
from megadiff.data.shards.ledger import Ledger
from megadiff.data.shards.work import make_shards
from megadiff.data.tokenizer_training import train_tokenizer
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.shards.corpus import FRAMING, UNIT_BYTES, contents, write_files, write_serial


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files, folder of shards, and the prefix that one process wrote."""
    folder = tmp_path_factory.mktemp("made")
    files = write_files(folder)
    write_serial(files, folder / "serial")
    make_shards(Corpus(files), folder / "shards", "byte", framing=FRAMING, unit_bytes=UNIT_BYTES)
    finish(folder / "shards")
    return files, folder / "shards", folder / "serial"


@pytest.mark.parametrize("unit_bytes", [1200, 5000, 10**9])
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_merged_shards_are_byte_for_byte_the_serial_files(tmp_path, unit_bytes, kind):
    files, tokenizer = write_files(tmp_path), "byte"
    if kind == "bpe":
        tokenizer = tmp_path / "tok"
        train_tokenizer(list(Corpus(files).documents()), tokenizer, kind="bpe", vocab_size=280)
    serial = write_serial(files, tmp_path / "serial", tokenizer=tokenizer)
    make_shards(Corpus(files), tmp_path / "shards", tokenizer, framing=FRAMING, unit_bytes=unit_bytes)
    merge(tmp_path / "shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == serial
    assert (tmp_path / "shards/tokens.idx").read_bytes() == serial[".idx"]
    assert (tmp_path / "shards/tokens.json").read_bytes() == serial[".json"]


@pytest.mark.parametrize("split", ["line", "blank-line"])
def test_text_files_are_byte_for_byte_the_same_too(tmp_path, split):
    file = tmp_path / "a.txt"
    file.write_text("\ufeff" + "".join(f"line {n}\n" + "\n" * (n % 3) for n in range(200)))
    serial = write_serial([file], tmp_path / "serial", text_split=split)
    corpus = Corpus([file], text_split=split)
    make_shards(corpus, tmp_path / "shards", "byte", framing=FRAMING, unit_bytes=300)
    merge(tmp_path / "shards", tmp_path / "merged")
    assert contents(tmp_path / "merged") == serial


def test_counts_are_those_of_one_pass(made):
    files, folder, _ = made
    corpus = Corpus(files)
    list(corpus.documents())
    assert report_of(folder) == corpus.report


def test_a_folder_is_trained_on_in_the_order_of_the_merged_file(made):
    """The content is the same too, so a run may change from one to the other."""
    _, folder, serial = made

    def opened(path):
        config = DataConfig.model_validate({"train": [str(path)], "valid": [str(path)], "tokenizer": "byte"})
        return open_data(config, ByteTokenizer(), seq_length=32, seed=5, valid_sequences=3)

    shards, file = opened(folder), opened(serial)
    assert shards.contents == file.contents
    assert shards.fingerprint == file.fingerprint
    samples = list(range(2 * file.sources[0].sequences))
    assert np.array_equal(shards.train.sequences(samples), file.train.sequences(samples))
    origins = [shards.train.origin(sample)[1:] for sample in samples[:50]]
    assert origins == [file.train.origin(sample)[1:] for sample in samples[:50]]


def test_shards_are_read_across_their_borders_with_few_files_open(made, monkeypatch):
    from megadiff.data import indexed_format

    monkeypatch.setattr(indexed_format, "_MOST_OPEN", 2)
    _, folder, serial = made
    shards, file = IndexedReader(f"{folder}/"), IndexedReader(serial)
    draw = np.random.default_rng(0)
    for start in draw.integers(0, file.num_tokens, size=200):
        count = int(draw.integers(0, min(9000, file.num_tokens - start) + 1))
        assert np.array_equal(shards.tokens(int(start), count), file.tokens(int(start), count))
    assert scan(folder).errors == 0


def test_units_that_are_missing_are_named(tmp_path):
    files = write_files(tmp_path)
    corpus = Corpus(files)
    make_shards(corpus, tmp_path / "shards", "byte", unit_bytes=UNIT_BYTES)
    (tmp_path / "shards/shards/000001").rename(tmp_path / "gone")
    with pytest.raises(DataError, match=r"wanted all \d+ units done, found 1 that are not \(1\); repeat the command"):
        merge(tmp_path / "shards", tmp_path / "merged")
    with pytest.raises(DataError, match=r"the folder of shards is not finished; wanted .*tokens\.idx, which"):
        IndexedReader(tmp_path / "shards")
    make_shards(corpus, tmp_path / "shards", "byte", unit_bytes=UNIT_BYTES)
    merge(tmp_path / "shards", tmp_path / "merged")


def test_a_damaged_shard_is_found_before_it_is_merged(tmp_path):
    files, folder = write_files(tmp_path), tmp_path / "shards"
    make_shards(Corpus(files), folder, "byte", unit_bytes=UNIT_BYTES)
    tokens = folder / "shards/000002/tokens.bin"
    whole = tokens.read_bytes()
    for content, said in (
        (whole[:-2], r"the shard is damaged \(wanted \d+ bytes, found \d+\); remove .*000002 and repeat"),
        (bytes([whole[0] ^ 1]) + whole[1:], r"\(its SHA-256 is not that of the record\); remove .*000002 and repeat"),
    ):
        tokens.write_bytes(content)
        with pytest.raises(DataError, match=said):
            merge(folder, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_a_corpus_without_documents_has_no_index(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": ""}\n' * 3)
    make_shards(Corpus([file]), tmp_path / "shards", "byte")
    with pytest.raises(DataError, match=r"shards: no documents to write; check the input files"):
        finish(tmp_path / "shards")


def test_two_processes_finish_a_folder_once(tmp_path, monkeypatch):
    files, folder = write_files(tmp_path), tmp_path / "shards"
    make_shards(Corpus(files), folder, "byte", unit_bytes=UNIT_BYTES)
    written = []
    write = module._write_index
    monkeypatch.setattr(module, "_write_index", lambda *given: (written.append(1), write(*given)))
    threads = [threading.Thread(target=finish, args=(folder,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [1]
    assert Ledger(folder).is_finished


def test_a_copy_where_the_kernel_cannot_is_the_same(made, tmp_path, monkeypatch):
    _, folder, serial = made

    def unsupported(*given):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(module.os, "copy_file_range", unsupported)
    merge(folder, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(serial)


def test_merged_data_are_not_replaced_unasked(made, tmp_path):
    _, folder, _ = made
    (tmp_path / "p.bin").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"p\.bin: data are there already; choose another --output-prefix"):
        merge(folder, tmp_path / "p")
    assert (tmp_path / "p.bin").read_bytes() == b"mine"
    merge(folder, tmp_path / "p", overwrite=True)
    before = (tmp_path / "p.bin").stat()
    merge(folder, tmp_path / "p")
    assert (tmp_path / "p.bin").stat() == before, "merged before, and left as it is"
