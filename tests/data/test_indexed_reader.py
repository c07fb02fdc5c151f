import gc
import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data.indexed_format import HEADER
from megadiff.data.indexed_reader import IndexedReader
from megadiff.errors import DataError
from tests.data.corpora import random_documents, write_indexed

DOCUMENTS = random_documents(12, longest=6)


def patched(path, offset, content):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(bytes(raw))


def test_files_of_megatron_without_manifest_are_read_with_documents_of_many_sequences(tmp_path):
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
    with pytest.raises(DataError, match=r"wanted 10000 bytes at token 0, found 4096: the file has shrunk"):
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
    "huge count": (18, struct.pack("<Q", 2**63), r"for the 9223372036854775808 sequences .* the header declares"),
    "no sequences": (18, struct.pack("<Q", 0), r"wanted at least one sequence"),
    "huge documents": (26, struct.pack("<Q", 2**60), r"the header declares"),
    "length 0": (HEADER.size + 4, struct.pack("<i", 0), r"wanted length\[1\] of at least 1, found 0"),
    "negative length": (HEADER.size, struct.pack("<i", -5), r"wanted length\[0\] of at least 1, found -5"),
    "longer length": (HEADER.size, struct.pack("<i", 200), r"wanted pointer\[1\] = 400"),
    "pointer": (HEADER.size + 4 * S + 16, struct.pack("<q", 2**62), r"wanted pointer\[2\] = \d+, found 4611"),
    "first document": (HEADER.size + 12 * S, struct.pack("<q", 1), r"wanted documents from 0 to 12, found 1 to 12"),
    "last document": (HEADER.size + 20 * S, struct.pack("<q", 13), r"wanted documents from 0 to 12, found 0 to 13"),
    "document order": (HEADER.size + 12 * S + 16, struct.pack("<q", 9), r"wanted document\[3\] >= 9, found 3"),
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


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    write_indexed(folder / "p", DOCUMENTS)
    (folder / "p.json").unlink()
    return folder


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_no_mutation_of_the_index_gives_wrong_documents(intact, mutations, near_header):
    """Every outcome is a DataError or a split of the same tokens that the document list itself allows."""
    raw = bytearray((intact / "p.idx").read_bytes())
    for place, value in mutations:
        raw[place % (HEADER.size if near_header else len(raw))] = value
    (intact / "q.idx").write_bytes(bytes(raw))
    (intact / "q.bin").write_bytes((intact / "p.bin").read_bytes())
    try:
        reader = IndexedReader(intact / "q")
    except DataError:
        return
    found = [i for number in range(reader.num_documents) for i in reader.document(number).tolist()]
    assert found == [i for document in DOCUMENTS for i in document]


def test_a_token_outside_the_vocabulary_is_named_with_its_document(tmp_path):
    documents = [[5, 6], [7], [8, 200, 9]]
    reader = IndexedReader(write_indexed(tmp_path / "p", documents))
    reader.check_vocabulary(201)
    with pytest.raises(DataError, match=r"document 2 has the token id 200 at position 1 \(wanted 0 to 199\)"):
        reader.check_vocabulary(200)
    with pytest.raises(DataError, match=r"document 1 has the token id 7 at position 0 \(the mask id\)"):
        reader.check_vocabulary(260, mask_id=7)


def test_a_full_scan_finds_what_the_sampled_one_may_miss(tmp_path):
    tokens = np.full(2_000_000, 5)
    tokens[999_983] = 250
    reader = IndexedReader(write_indexed(tmp_path / "p", [tokens[:1000], tokens[1000:]]))
    reader.check_vocabulary(200)
    with pytest.raises(DataError, match=r"document 1 has the token id 250 at position 998983"):
        reader.check_vocabulary(200, full=True)


def test_the_content_fingerprint_follows_the_tokens_and_not_the_path(tmp_path):
    first = IndexedReader(write_indexed(tmp_path / "a", [[5, 6, 7]])).content_fingerprint()
    assert IndexedReader(write_indexed(tmp_path / "b", [[5, 6, 7]])).content_fingerprint() == first
    assert IndexedReader(write_indexed(tmp_path / "c", [[5, 6, 8]])).content_fingerprint() != first
    assert IndexedReader(write_indexed(tmp_path / "d", [[5], [6, 7]])).content_fingerprint() != first


def test_a_manifest_that_is_damaged_or_of_other_data_is_refused(tmp_path):
    write_indexed(tmp_path / "p", [[5, 6, 7]])
    path = tmp_path / "p.json"
    good = json.loads(path.read_text())
    cases = [
        ("{", r"p\.json: the manifest is not JSON"),
        ("[]", r"`the file` in the manifest"),
        (json.dumps({**good, "version": 99}), r"wanted manifest version 1, found 99; upgrade megadiff"),
        (json.dumps({**good, "tokens": "many"}), r"`tokens` in the manifest: Input should be a valid integer"),
        (json.dumps({**good, "tokens": 4}), r"wanted the documents, tokens and dtype \(1, 3, 'uint16'\).*found \(1, 4"),
    ]
    for content, text in cases:
        path.write_text(content)
        with pytest.raises(DataError, match=text):
            IndexedReader(tmp_path / "p")
