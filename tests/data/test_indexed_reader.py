import gc
import json
import os
import struct
import tracemalloc
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest

from megadiff.data import indexed_format, indexed_reader
from megadiff.data.indexed_format import HEADER
from megadiff.data.indexed_reader import IndexedReader
from megadiff.errors import DataError
from tests.data.corpora import random_documents, write_indexed

DOCUMENTS = random_documents(12, longest=6)


def patched(path, offset, content):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(bytes(raw))


def test_megatron_files_without_a_manifest_are_read_with_long_documents(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "p.bin"), dtype=np.int32)
    for document in ([[1, 2], [3]], [[4, 5, 6]]):
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(str(tmp_path / "p.idx"))
    reader = IndexedReader(tmp_path / "p.bin")
    assert [reader.document(i).tolist() for i in range(2)] == [[1, 2, 3], [4, 5, 6]]
    assert (reader.manifest, reader.tokenizer_fingerprint, reader.bytes_per_token) == (None, None, None)
    assert (reader.num_documents, reader.num_sequences, reader.num_tokens) == (2, 3, 6)


def test_sequences_without_tokens_are_read_as_megatron_reads_them(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    written = [[[]], [[1, 2], [], [3]], [[], []], [], [[4]], [[], [5, 6], []], [[7], []]]
    builder = IndexedDatasetBuilder(str(tmp_path / "p.bin"), dtype=np.uint16)
    for document in written:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(tmp_path / "p.idx"))
    theirs = IndexedDataset(str(tmp_path / "p"))
    ends = theirs.document_indices

    reader = IndexedReader(tmp_path / "p")

    wanted = [[t for i in range(a, b) for t in theirs[i].tolist()] for a, b in pairwise(ends)]
    assert wanted == [[token for sequence in document for token in sequence] for document in written]
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == wanted
    assert reader.tokens(0, 7).tolist() == [1, 2, 3, 4, 5, 6, 7]
    places = [(document, place) for document, ids in enumerate(wanted) for place in range(len(ids))]
    assert [reader.locate(token) for token in range(7)] == places
    assert reader.empty_documents() == (3, 0)


def test_empty_documents_are_counted_across_pieces_of_the_index(tmp_path, monkeypatch):
    lengths = [0, 0, 2, 0, 1, 0, 0, 0, 3, 0]
    starts = [0, 1, 3, 3, 6, 8, 10]
    pointers = np.cumsum([0, *lengths[:-1]]) * 2
    (tmp_path / "p.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    (tmp_path / "p.idx").write_bytes(
        HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, len(lengths), len(starts))
        + np.array(lengths, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(starts, "<i8").tobytes()
    )
    wanted = [sum(lengths[a:b]) for a, b in pairwise(starts)]
    for chunk in (2, 3, 2**20):
        monkeypatch.setattr(indexed_format, "CHUNK", chunk)
        monkeypatch.setattr(indexed_reader, "CHUNK", chunk)
        reader = IndexedReader(tmp_path / "p")
        assert [len(reader.document(i)) for i in range(reader.num_documents)] == wanted
        assert reader.empty_documents() == (wanted.count(0), wanted.index(0))


def test_an_index_without_any_token_is_refused(tmp_path):
    (tmp_path / "p.bin").write_bytes(b"")
    (tmp_path / "p.idx").write_bytes(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 1, 2) + struct.pack("<iqqq", 0, 0, 0, 1))
    with pytest.raises(DataError, match=r"wanted at least one token in the lengths from byte 34 on, found 0"):
        IndexedReader(tmp_path / "p")


def test_tokens_cross_document_ends_and_survive_the_reader(tmp_path):
    """Megatron's reader unmaps the file under its arrays: a segmentation fault."""
    reader = IndexedReader(write_indexed(tmp_path / "p", DOCUMENTS))
    flat = [i for document in DOCUMENTS for i in document]
    found = reader.tokens(3, 20)
    del reader
    gc.collect()
    found += 1
    assert found.dtype == np.int64
    assert (found - 1).tolist() == flat[3:23]


def test_reading_outside_is_refused(tmp_path):
    reader = IndexedReader(write_indexed(tmp_path / "p", [[1, 2, 3]]))
    with pytest.raises(IndexError, match="tokens 2 to 4 are outside 0 to 3"):
        reader.tokens(2, 2)
    with pytest.raises(IndexError, match="document 1 is outside 0 to 0"):
        reader.document(1)


def test_missing_files_are_named_with_what_lies_beside(tmp_path):
    with pytest.raises(DataError, match=r"no indexed data; wanted .*p\.idx and .*p\.bin, found no .*p\.idx and no"):
        IndexedReader(tmp_path / "p")
    write_indexed(tmp_path / "p_text_document", [[1]])
    with pytest.raises(DataError, match=r"did you mean .*p_text_document\?"):
        IndexedReader(tmp_path / "p")


@pytest.mark.parametrize("ending", [".jsonl", ".txt"])
def test_a_file_beside_its_indexed_data_is_answered_with_their_prefix(tmp_path, ending):
    for name in (f"train{ending}", "train.bin", "train.idx"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"did you mean {tmp_path}/train\?"):
        IndexedReader(tmp_path / f"train{ending}")


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_a_cut_bin_is_refused_with_both_sizes(tmp_path, cut):
    write_indexed(tmp_path / "p", DOCUMENTS)
    size = (tmp_path / "p.bin").stat().st_size
    os.truncate(tmp_path / "p.bin", size - cut)
    with pytest.raises(DataError, match=rf"p\.bin: wanted {size} bytes, found {size - cut}; the file is cut short"):
        IndexedReader(tmp_path / "p")


def test_a_bin_that_shrinks_while_open_is_an_error_and_no_signal(tmp_path):
    reader = IndexedReader(write_indexed(tmp_path / "p", [[5] * 5000]))
    os.truncate(tmp_path / "p.bin", 4096)
    with pytest.raises(DataError, match=r"wanted 10000 bytes at byte 0, found 4096: the file has shrunk"):
        reader.tokens(0, 5000)


def test_an_index_cut_anywhere_is_refused(tmp_path):
    write_indexed(tmp_path / "p", DOCUMENTS)
    whole = (tmp_path / "p.idx").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "p.idx").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"p\.idx: wanted"):
            IndexedReader(tmp_path / "p")


S = len(DOCUMENTS)
DAMAGE = {
    "magic": (0, b"X", r"wanted the magic .* at byte 0"),
    "version": (9, struct.pack("<Q", 2), r"wanted version 1 at byte 9, found 2"),
    "dtype": (17, b"\x07", r"wanted an integer dtype code .* at byte 17, found 7"),
    "huge count": (
        18,
        struct.pack("<Q", 2**63),
        r"for the 9223372036854775808 sequences \(byte 18\) .* the header declares",
    ),
    "no sequences": (18, struct.pack("<Q", 0), r"wanted at least one sequence"),
    "huge documents": (26, struct.pack("<Q", 2**60), r"the header declares"),
    "length 0": (HEADER.size + 4, struct.pack("<i", 0), r"wanted length\[1\] at byte 38 of at least 1, found 0"),
    "negative length": (HEADER.size, struct.pack("<i", -5), r"wanted length\[0\] at byte 34 of at least 1, found -5"),
    "longer length": (HEADER.size, struct.pack("<i", 200), r"wanted pointer\[1\] at byte 90 = 400"),
    "pointer": (
        HEADER.size + 4 * S + 16,
        struct.pack("<q", 2**62),
        r"wanted pointer\[2\] at byte 98 = \d+, found 4611",
    ),
    "first document": (HEADER.size + 12 * S, struct.pack("<q", 1), r"wanted document\[0\] at byte 178 = 0, found 1"),
    "last document": (HEADER.size + 20 * S, struct.pack("<q", 13), r"wanted document\[12\] at byte 274 = 12, found 13"),
    "document order": (
        HEADER.size + 12 * S + 16,
        struct.pack("<q", 9),
        r"wanted document\[2\] at byte 194 = 2, found 9",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damaged_field_is_named(tmp_path, kind):
    offset, content, text = DAMAGE[kind]
    write_indexed(tmp_path / "p", DOCUMENTS)
    patched(tmp_path / "p.idx", offset, content)
    with pytest.raises(DataError, match=text):
        IndexedReader(tmp_path / "p")


def test_a_dtype_flipped_to_another_integer_is_caught(tmp_path):
    """Megatron's reader gives garbage tokens here."""
    write_indexed(tmp_path / "p", DOCUMENTS)
    patched(tmp_path / "p.idx", 17, b"\x04")
    with pytest.raises(DataError, match=r"wanted pointer\[1\]"):
        IndexedReader(tmp_path / "p")


def test_documents_of_a_file_without_a_manifest_must_rise(tmp_path):
    """Ours hold one sequence a document; Megatron's may hold several, or none."""
    write_indexed(tmp_path / "p", DOCUMENTS)
    (tmp_path / "p.json").unlink()
    patched(tmp_path / "p.idx", HEADER.size + 12 * S + 16, struct.pack("<q", 1))
    reader = IndexedReader(tmp_path / "p")
    assert reader.empty_documents() == (1, 1)
    assert [reader.document(i).tolist() for i in (0, 1)] == [DOCUMENTS[0], []]
    assert reader.locate(len(DOCUMENTS[0])) == (2, 0)
    patched(tmp_path / "p.idx", HEADER.size + 12 * S + 16, struct.pack("<q", 9))
    with pytest.raises(DataError, match=r"wanted document\[3\] at byte 202 >= 9, found 3"):
        IndexedReader(tmp_path / "p")


def test_an_index_that_shrinks_while_open_is_an_error_and_no_signal(tmp_path):
    """A mapped index would end the process with SIGBUS here."""
    reader = IndexedReader(write_indexed(tmp_path / "p", [[5]] * 3000))
    os.truncate(tmp_path / "p.idx", 34)
    with pytest.raises(DataError, match=r"p\.idx: wanted 16 bytes at byte \d+, found 0: the file has shrunk"):
        reader.document(2999)


def test_counts_far_beyond_the_file_are_refused_without_an_allocation(tmp_path):
    """A sparse index of the size its header declares costs nothing to make, and must cost nothing to refuse."""
    count = 2**34
    write_indexed(tmp_path / "p", DOCUMENTS)
    (tmp_path / "p.json").unlink()
    with open(tmp_path / "p.idx", "r+b") as file:
        file.write(HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, count, 2))
        file.truncate(HEADER.size + 12 * count + 16)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"wanted pointer\[1\] at byte"):
        IndexedReader(tmp_path / "p")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


def test_lengths_whose_sum_leaves_64_bits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed_reader, "_MOST_TOKENS", 30)
    write_indexed(tmp_path / "p", [[5] * 31])
    with pytest.raises(DataError, match=r"wanted at most 30 tokens in the lengths from byte 34 on, found 31"):
        IndexedReader(tmp_path / "p")


def test_opening_many_times_leaves_no_file_open(tmp_path):
    write_indexed(tmp_path / "p", DOCUMENTS)
    before = len(os.listdir("/proc/self/fd"))
    for cut in (0, 1):
        os.truncate(tmp_path / "p.bin", (tmp_path / "p.bin").stat().st_size - cut)
        for _ in range(20):
            with suppress(DataError):
                IndexedReader(tmp_path / "p").tokens(0, 5)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_token_outside_the_vocabulary_is_named_with_its_document(tmp_path):
    documents = [[5, 6], [7], [8, 200, 9]]
    reader = IndexedReader(write_indexed(tmp_path / "p", documents))
    reader.check_vocabulary(201)
    with pytest.raises(DataError, match=r"document 2 has the token id 200 at position 1 \(wanted 0 to 199\)"):
        reader.check_vocabulary(200)
    with pytest.raises(DataError, match=r"document 1 has the token id 7 at position 0 \(the mask id\)"):
        reader.check_vocabulary(260, mask_id=7)


def test_a_full_scan_finds_what_the_sampled_one_may_miss(tmp_path):
    tokens = np.full(3_000_000, 5)
    reader = IndexedReader(write_indexed(tmp_path / "p", [tokens[:1000], tokens[1000:]]))
    seen = np.zeros(3_000_000, dtype=bool)
    for start, count in [*reader._even_spans(), *reader._random_spans()]:
        seen[start : start + count] = True
    assert seen[[0, -1]].all()
    unseen = int(np.flatnonzero(~seen)[seen.sum() // 2])
    patched(tmp_path / "p.bin", 2 * unseen, (250).to_bytes(2, "little"))
    reader.check_vocabulary(200)
    with pytest.raises(DataError, match=rf"document 1 has the token id 250 at position {unseen - 1000}"):
        reader.check_vocabulary(200, full=True)


def test_damage_that_repeats_between_the_even_spans_meets_a_random_one(tmp_path):
    tokens = np.full(3_000_000, 5)
    reader = IndexedReader(write_indexed(tmp_path / "q", [tokens]))
    between = np.ones(3_000_000, dtype=bool)
    for start, count in reader._even_spans():
        between[start : start + count] = False
    tokens[between] = 250
    with pytest.raises(DataError, match=r"document 0 has the token id 250 at position \d+ \(wanted 0 to 199\)"):
        IndexedReader(write_indexed(tmp_path / "p", [tokens])).check_vocabulary(200)


def test_what_no_sample_saw_is_refused_when_it_is_read_and_never_clamped(tmp_path):
    reader = IndexedReader(write_indexed(tmp_path / "p", [[5] * 10, [5, 6, 7, 8]]))
    reader.check_vocabulary(200, mask_id=3)
    for token, text in ((250, r"250 at position 2 \(wanted 0 to 199\)"), (3, r"3 at position 2 \(the mask id\)")):
        patched(tmp_path / "p.bin", 2 * 12, token.to_bytes(2, "little"))
        with pytest.raises(DataError, match=rf"document 1 has the token id {text}; preprocess the corpus"):
            reader.tokens(10, 4)


def test_a_negative_token_is_refused_without_any_vocabulary(tmp_path):
    """uint16 read as int16: the one change of type that keeps every size."""
    write_indexed(tmp_path / "p", [[5, 40_000]], vocab_size=50_000)
    (tmp_path / "p.json").unlink()
    patched(tmp_path / "p.idx", 17, b"\x03")
    with pytest.raises(DataError, match=r"document 0 has the token id -25536 at position 1 \(wanted 0 or more\)"):
        IndexedReader(tmp_path / "p").tokens(0, 2)


def test_the_content_fingerprint_follows_the_tokens_and_not_the_path(tmp_path):
    first = IndexedReader(write_indexed(tmp_path / "a", [[5, 6, 7]])).content_fingerprint()
    assert IndexedReader(write_indexed(tmp_path / "b", [[5, 6, 7]])).content_fingerprint() == first
    assert IndexedReader(write_indexed(tmp_path / "c", [[5, 6, 8]])).content_fingerprint() != first
    assert IndexedReader(write_indexed(tmp_path / "d", [[5], [6, 7]])).content_fingerprint() != first


@pytest.mark.parametrize("kind", [".idx", ".bin"])
def test_the_content_fingerprint_changes_with_any_byte(tmp_path, kind):
    """Whatever still opens after a byte was changed has another fingerprint."""
    write_indexed(tmp_path / "p", [[5, 6], [7], [8, 9, 10]])
    (tmp_path / "p.json").unlink()
    whole = (tmp_path / f"p{kind}").read_bytes()
    first, opened = IndexedReader(tmp_path / "p").content_fingerprint(), 0
    for place in range(len(whole)):
        patched(tmp_path / f"p{kind}", place, bytes([whole[place] ^ 1]))
        with suppress(DataError):
            assert IndexedReader(tmp_path / "p").content_fingerprint() != first, place
            opened += 1
        patched(tmp_path / f"p{kind}", place, whole[place : place + 1])
    assert IndexedReader(tmp_path / "p").content_fingerprint() == first
    assert opened == len(whole) if kind == ".bin" else opened >= 1


def test_a_large_files_content_fingerprint_follows_its_manifests_hash(tmp_path):
    """Between the spans it reads, it relies on what the writer recorded; the time of a file plays no part."""
    tokens = np.full(1_500_000, 5)
    one = IndexedReader(write_indexed(tmp_path / "one", [tokens]))
    unseen = one._even_spans()[0][1] + 1
    tokens[unseen] = 6
    other = IndexedReader(write_indexed(tmp_path / "other", [tokens]))
    assert other.content_fingerprint() != one.content_fingerprint()
    os.utime(tmp_path / "one.bin", (0, 0))
    assert IndexedReader(tmp_path / "one").content_fingerprint() == one.content_fingerprint()


def test_a_manifest_that_is_damaged_or_of_other_data_is_refused(tmp_path):
    write_indexed(tmp_path / "p", [[5, 6, 7]])
    path = tmp_path / "p.json"
    good = json.loads(path.read_text())
    cases = [
        ("{", r"p\.json: the manifest is not JSON"),
        (json.dumps({**good, "version": 0}), r"`version` in the manifest: Input should be greater"),
        (json.dumps({**good, "bin_sha256": "00"}), r"`bin_sha256` in the manifest: String should match"),
        ("[]", r"`the file` in the manifest"),
        (json.dumps({**good, "version": 99}), r"wanted a manifest of version 3 at most, found 99; upgrade megadiff"),
        (json.dumps({**good, "tokens": "many"}), r"`tokens` in the manifest: Input should be a valid integer"),
        (json.dumps({**good, "tokens": 4}), r"wanted the documents, tokens and dtype \(1, 3, 'uint16'\).*found \(1, 4"),
    ]
    for content, text in cases:
        path.write_text(content)
        with pytest.raises(DataError, match=text):
            IndexedReader(tmp_path / "p")


def test_a_manifest_of_version_1_which_has_no_hash_of_the_index_is_read(tmp_path):
    write_indexed(tmp_path / "p", [[5, 6, 7]])
    path = tmp_path / "p.json"
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "idx_sha256"}
    path.write_text(json.dumps({**old, "version": 1}))
    manifest = IndexedReader(tmp_path / "p").manifest
    assert manifest is not None
    assert (manifest.version, manifest.idx_sha256) == (1, None)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "..", ""])
def test_a_manifest_may_only_name_plain_files(tmp_path, name):
    write_indexed(tmp_path / "p", [[5, 6, 7]])
    path = tmp_path / "p.json"
    inputs = [{"name": name, "bytes": 1, "sha256": "0" * 64}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "inputs": inputs}))
    with pytest.raises(
        DataError, match=r"`inputs\.0\.name` in the manifest: .*wanted a file's name without its folder"
    ):
        IndexedReader(tmp_path / "p")
