import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadiff.data.indexed_format import tokenizer_facts
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.corpora import random_documents, write_indexed

FACTS = tokenizer_facts(ByteTokenizer())


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("vocab_size", [260, 65499, 65500, 128256])
def test_files_are_byte_for_byte_those_of_megatron(tmp_path, vocab_size):
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    draw = np.random.default_rng(1)
    documents = [draw.integers(0, vocab_size, size=draw.integers(1, 60)).tolist() for _ in range(200)]
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        theirs.add_item(torch.tensor(document))
        theirs.end_document()
    theirs.finalize(str(tmp_path / "theirs.idx"))

    write_indexed(tmp_path / "ours", documents, vocab_size)

    for kind in (".bin", ".idx"):
        assert (tmp_path / f"ours{kind}").read_bytes() == (tmp_path / f"theirs{kind}").read_bytes()
    opened = IndexedDataset(str(tmp_path / "ours"))
    assert [opened[i].tolist() for i in range(3)] == documents[:3]


def test_adding_many_documents_at_once_gives_the_same_files(tmp_path):
    documents = random_documents(50)
    write_indexed(tmp_path / "one", documents)
    with IndexedWriter(tmp_path / "many", vocab_size=260) as writer:
        for part in (documents[:20], documents[20:]):
            writer.add_documents(np.concatenate([np.array(d) for d in part]), [len(d) for d in part])
        writer.finish(tokenizer=FACTS, source_bytes=writer.num_tokens)
    for kind in (".bin", ".idx", ".json"):
        assert (tmp_path / f"one{kind}").read_bytes() == (tmp_path / f"many{kind}").read_bytes()


@settings(max_examples=40, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 259), min_size=1, max_size=20), min_size=1, max_size=20))
def test_what_is_written_is_read(tmp_path_factory, documents):
    prefix = write_indexed(tmp_path_factory.mktemp("data") / "p", documents)
    reader = IndexedReader(prefix)
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == documents
    assert reader.tokens(0, reader.num_tokens).tolist() == [i for document in documents for i in document]


def test_a_wrong_token_is_refused_before_its_documents_are_written(tmp_path):
    with IndexedWriter(tmp_path / "p", vocab_size=260, mask_id=3) as writer:
        writer.add_document([1, 2])
        with pytest.raises(DataError, match=r"document 2 has the token id 70000 \(wanted 0 to 259\)"):
            writer.add_documents(np.array([5, 5, 70000]), [2, 1])
        with pytest.raises(DataError, match=r"document 1 has the token id -1 \(wanted"):
            writer.add_document([-1])
        with pytest.raises(DataError, match=r"document 2 has the token id 3 \(the mask, which no text may hold\)"):
            writer.add_documents(np.array([5, 3, 5]), [1, 2])
        with pytest.raises(DataError, match=r"document 1 must hold 1 to"):
            writer.add_document([])
        with pytest.raises(ValueError, match=r"ids must be integers, got float64"):
            writer.add_document([1.5])
        assert (writer.num_documents, writer.num_tokens) == (1, 2)
        manifest = writer.finish(tokenizer=FACTS, source_bytes=2)
    assert IndexedReader(tmp_path / "p").tokens(0, 2).tolist() == [1, 2]
    for kind, said in ((".bin", manifest.bin_sha256), (".idx", manifest.idx_sha256)):
        assert said == hashlib.sha256((tmp_path / f"p{kind}").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("vocab_size", "token", "dtype"), [(65499, 65535, "uint16"), (65499, 65536, "uint16"), (128256, 2**31, "int32")]
)
def test_a_token_too_large_for_its_integer_type_is_never_stored(tmp_path, vocab_size, token, dtype):
    """Megatron's builder stores 70000 in uint16 as 4464."""
    with IndexedWriter(tmp_path / "p", vocab_size=vocab_size) as writer:
        assert writer.dtype.name == dtype
        with pytest.raises(DataError, match=rf"document 0 has the token id {token} \(wanted 0 to {vocab_size - 1}\)"):
            writer.add_document(np.array([7, token]))
        writer._output.bin.flush()
        assert (tmp_path / "p.bin.tmp").stat().st_size == 0


def test_no_documents_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no documents to write"), IndexedWriter(tmp_path / "p", vocab_size=260) as w:
        w.finish(tokenizer=FACTS, source_bytes=0)
    assert files_in(tmp_path) == []


def test_an_error_inside_leaves_nothing(tmp_path):
    def interrupted():
        with IndexedWriter(tmp_path / "p", vocab_size=260) as writer:
            writer.add_document([1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files_in(tmp_path) == []


def test_finished_data_are_kept_unless_overwriting_was_asked(tmp_path):
    write_indexed(tmp_path / "p", [[1, 2, 3]])
    with pytest.raises(DataError, match=r"p\.bin: data are there already; .*--overwrite"):
        IndexedWriter(tmp_path / "p", vocab_size=260)
    with IndexedWriter(tmp_path / "p", vocab_size=260, overwrite=True) as writer:
        writer.add_document([9])
        writer.finish(tokenizer=FACTS, source_bytes=1)
    assert IndexedReader(tmp_path / "p").tokens(0, 1).tolist() == [9]


def test_overwriting_that_fails_keeps_the_old_data(tmp_path):
    write_indexed(tmp_path / "p", [[1, 2, 3]])
    with (
        pytest.raises(DataError, match="token id 999"),
        IndexedWriter(tmp_path / "p", vocab_size=260, overwrite=True) as writer,
    ):
        writer.add_document([999])
    assert IndexedReader(tmp_path / "p").tokens(0, 3).tolist() == [1, 2, 3]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written \(.*\); choose another --output-prefix"):
        IndexedWriter(tmp_path / "file" / "p", vocab_size=260)


def test_a_full_disk_is_one_sentence(tmp_path):
    writer = IndexedWriter(tmp_path / "p", vocab_size=260)
    writer._output.bin.close()
    writer._output.bin = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - a buffered one would fail again when closed
    with pytest.raises(DataError, match=r"writing failed \(No space left on device\); free disk space"), writer:
        writer.add_document([7] * 1000)
    assert files_in(tmp_path) == []


def test_two_writers_of_one_prefix_do_not_mix(tmp_path):
    with (
        IndexedWriter(tmp_path / "p", vocab_size=260),
        pytest.raises(DataError, match=r"another process is writing it"),
    ):
        IndexedWriter(tmp_path / "p", vocab_size=260)


DIE_AT_RENAME = """
import os, signal, sys
real, calls = os.replace, [0]
def replace(a, b):
    if calls[0] == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls[0] += 1
    real(a, b)
os.replace = replace
sys.path.insert(0, os.getcwd())
from megadiff.data.indexed_format import tokenizer_facts
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.tokenizers.byte import ByteTokenizer
with IndexedWriter(sys.argv[1], vocab_size=260, overwrite=True) as writer:
    writer.add_document([1, 2, 3])
    writer.finish(tokenizer=tokenizer_facts(ByteTokenizer()), source_bytes=3)
"""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_between_renames_leaves_no_index_and_the_next_run_succeeds(tmp_path, renames):
    command = [sys.executable, "-c", DIE_AT_RENAME, str(tmp_path / "p"), str(renames)]
    assert subprocess.run(command, cwd=os.getcwd(), check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "p.idx").exists()
    write_indexed(tmp_path / "p", [[4, 5]])
    assert files_in(tmp_path) == ["p.bin", "p.idx", "p.json"]
    assert IndexedReader(tmp_path / "p").tokens(0, 2).tolist() == [4, 5]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_replacing_data_never_mixes_index_and_tokens(tmp_path, renames):
    write_indexed(tmp_path / "p", [[7, 7, 7, 7]])
    command = [sys.executable, "-c", DIE_AT_RENAME, str(tmp_path / "p"), str(renames)]
    assert subprocess.run(command, cwd=os.getcwd(), check=False).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match=r"no indexed data; .*found no .*p\.idx; run `megadiff preprocess_data` first"):
        IndexedReader(tmp_path / "p")
    write_indexed(tmp_path / "p", [[4, 5]])
    assert IndexedReader(tmp_path / "p").tokens(0, 2).tolist() == [4, 5]
