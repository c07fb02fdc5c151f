import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from megadiff.data import corpus_files, corpus_streams, documents, indexed_writer
from megadiff.data import preprocess as module
from megadiff.data.documents import Corpus
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.preprocess import DocumentMarkers, preprocess
from megadiff.data.tokenizer_training import train_tokenizer
from megadiff.data.tokenizers import _pipeline, byte, load_tokenizer
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import DataError
from tests.data.corpora import end_process

TEXTS = [f"Document {n}: the quick brown fox, née {n * n}." + " again" * (n % 7) for n in range(400)]


def write_corpus(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl")


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_documents_come_back_as_they_were_with_their_facts(tmp_path, corpus_file):
    done = preprocess(Corpus([corpus_file]), tmp_path / "p", "byte")
    reader, tokenizer = IndexedReader(tmp_path / "p"), ByteTokenizer()
    assert [tokenizer.decode(reader.document(i)) for i in range(reader.num_documents)] == TEXTS
    manifest = done.manifest
    assert reader.manifest == manifest
    assert (manifest.documents, manifest.dtype) == (400, "uint16")
    assert manifest.source_bytes == manifest.tokens == sum(len(text.encode()) for text in TEXTS)
    assert manifest.tokenizer.fingerprint == tokenizer.fingerprint
    assert manifest.bin_sha256 == hashlib.sha256((tmp_path / "p.bin").read_bytes()).hexdigest()
    assert [(f.name, f.sha256) for f in manifest.inputs] == [
        ("c.jsonl", hashlib.sha256(corpus_file.read_bytes()).hexdigest())
    ]


def test_framing_puts_bos_before_and_eos_after_each_document(tmp_path, corpus_file):
    done = preprocess(
        Corpus([corpus_file]), tmp_path / "p", "byte", framing=DocumentMarkers(prepend_bos=True, append_eod=True)
    )
    reader = IndexedReader(tmp_path / "p")
    first = reader.document(0).tolist()
    assert (first[0], first[-1]) == (0, 1)
    assert done.manifest.appended_eod
    assert done.manifest.prepended_bos
    assert reader.num_tokens == done.manifest.source_bytes + 2 * 400


def test_one_and_two_workers_write_the_same_bytes(tmp_path, corpus_file, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 23)
    train_tokenizer(TEXTS, tmp_path / "tok", kind="bpe", vocab_size=300)
    for name, workers in (("one", 1), ("two", 2)):
        preprocess(Corpus([corpus_file]), tmp_path / name, tmp_path / "tok", workers=workers)
    for kind in (".bin", ".idx", ".json"):
        assert (tmp_path / f"one{kind}").read_bytes() == (tmp_path / f"two{kind}").read_bytes()


def test_empty_documents_and_bad_lines_are_counted(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": ""}\nbad\n{"text": "b"}\n')
    done = preprocess(Corpus([tmp_path / "c.jsonl"], max_bad_lines=1), tmp_path / "p", "byte")
    assert (done.report.documents, done.report.empty_documents, done.report.bad_lines) == (2, 1, 1)
    assert done.manifest.documents == 2


def test_a_bad_line_late_in_the_corpus_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 1)
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n' * 50 + "bad\n")
    with pytest.raises(DataError, match=r"c\.jsonl:51: not a JSON object"):
        preprocess(Corpus([tmp_path / "c.jsonl"]), tmp_path / "p", "byte")
    assert files_in(tmp_path) == ["c.jsonl"]


def words(folder, **config):
    """A vocabulary of three words; text outside it has no id, or that of `unknown`."""
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, **config))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_a_document_that_cannot_be_tokenized_is_a_bad_line_of_its_file(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 3)
    tokenizer = words(tmp_path / "t")
    lines = ["a", "", "a strange", "b", "b odd", "a b"]
    file = write_corpus(tmp_path / "c.jsonl", lines)
    with pytest.raises(DataError) as caught:
        preprocess(Corpus([file]), tmp_path / "p", tokenizer, workers=workers)
    assert str(caught.value).startswith(f"{file}:3: document 3 of the file: 'a strange' cannot be tokenized (WordLevel")
    assert str(caught.value).endswith(
        "; correct the line or raise --max-bad-lines (0 bad lines are allowed and this is one more)"
    )
    assert not (tmp_path / "p.idx").exists()
    with pytest.raises(DataError, match=r"c\.jsonl:5: document 5 of the file: 'b odd' cannot be tokenized"):
        preprocess(Corpus([file], max_bad_lines=1), tmp_path / "p", tokenizer, workers=workers)

    done = preprocess(Corpus([file], max_bad_lines=2), tmp_path / "p", tokenizer, workers=workers)

    reader = IndexedReader(tmp_path / "p")
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == [[0], [1], [0, 1]]
    assert (done.report.documents, done.report.empty_documents, done.report.bad_lines) == (3, 1, 2)
    assert [example.split(": ")[0] for example in done.report.bad_examples] == [f"{file}:3", f"{file}:5"]
    assert done.manifest.source_bytes == 5


def test_unknown_text_is_ordinary_where_padding_is_the_unknown_token(tmp_path):
    tokenizer = words(tmp_path / "t", unk_token="?")
    (tokenizer / "tokenizer_config.json").write_text('{"pad_token": "?", "eos_token": "?"}')
    file = write_corpus(tmp_path / "c.jsonl", ["a strange b", "?"])
    done = preprocess(Corpus([file]), tmp_path / "p", tokenizer, framing=DocumentMarkers(append_eod=True))
    reader = IndexedReader(tmp_path / "p")
    assert [reader.document(i).tolist() for i in range(2)] == [[0, 2, 1, 2], [2, 2]]
    assert (done.manifest.tokenizer.pad_id, done.manifest.tokenizer.mask_id) == (2, 3)


class Strange:
    """A tokenizer that gives some texts ids it must not give."""

    vocab_size, mask_id, bos_id, eos_id = 10, 9, 0, 1

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def encode_pieces(self, text):
        yield self.encode(text)

    def encode(self, text):
        return [int(word) for word in text.split()]


def test_ids_that_no_text_may_have_are_a_fault_of_their_document(tmp_path):
    texts = ["2 3", "2 9", "4", "5 10", "-1", " ", "70000", "6"]
    found = module._tokenize(Strange(), DocumentMarkers(prepend_bos=True, append_eod=True), texts)
    assert found.ids.tolist() == [0, 2, 3, 1, 0, 4, 1, 0, 6, 1]
    assert (found.lengths.tolist(), found.num_empty, found.source_bytes) == ([4, 3, 3], 1, 5)
    assert found.faults == [
        (1, "the tokenizer gives it the id 9 (the mask, which no text may hold)"),
        (3, "the tokenizer gives it the id 10 (not 0 to 9)"),
        (4, "the tokenizer gives it the id -1 (not 0 to 9)"),
        (6, "the tokenizer gives it the id 70000 (not 0 to 9)"),
    ]


def test_a_document_of_too_many_tokens_is_a_fault_and_not_the_end(monkeypatch):
    monkeypatch.setattr(module, "_MOST_DOCUMENT_TOKENS", 3)
    found = module._tokenize(Strange(), DocumentMarkers(append_eod=True), ["2 3", "2 3 4", "5"])
    assert (found.ids.tolist(), [place for place, _ in found.faults]) == ([2, 3, 1, 5, 1], [1])


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_long_document_takes_memory_in_proportion_to_its_text(tmp_path, kind, monkeypatch):
    """Lists of Python integers, and the library's own tokens, take tens of bytes for each token."""
    pieces = [(module, "_BATCH_CHARACTERS"), (byte, "_PIECE_CHARACTERS"), (indexed_writer, "_WRITE_CHUNK")]
    pieces += [(_pipeline, "WINDOW_CHARACTERS"), (documents, "CHUNK_BYTES")]
    for owner, name in [*pieces, (corpus_files, "CHUNK_BYTES"), (corpus_streams, "CHUNK_BYTES")]:
        monkeypatch.setattr(owner, name, 2**14)
    tokenizer = "byte" if kind == "byte" else tmp_path / "tok"
    if kind == "bpe":
        train_tokenizer(TEXTS, tokenizer, kind="bpe", vocab_size=300)
    text = "the quick brown fox, née 4; " * 20_000
    (tmp_path / "long.txt").write_text(text)
    preprocess(Corpus([write_corpus(tmp_path / "small.jsonl", ["a"])]), tmp_path / "small", tokenizer)
    tracemalloc.start()
    preprocess(Corpus([tmp_path / "long.txt"]), tmp_path / "p", tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * len(text) + 2**21
    ids = load_tokenizer(tokenizer).encode(text)
    assert IndexedReader(tmp_path / "p").document(0).tolist() == ids


def test_what_cannot_work_is_refused_before_reading(tmp_path, corpus_file, monkeypatch):
    monkeypatch.setattr(Corpus, "documents", lambda self: pytest.fail("the corpus was read"))
    corpus = Corpus([corpus_file])
    with pytest.raises(DataError, match=r"--workers must be at least 1, found 0"):
        preprocess(corpus, tmp_path / "p", "byte", workers=0)
    with pytest.raises(DataError, match=r"found nothing; check the path"):
        preprocess(corpus, tmp_path / "p", tmp_path / "no-tokenizer")
    (tmp_path / "p.idx").write_text("")
    with pytest.raises(DataError, match=r"p\.idx: data are there already"):
        preprocess(corpus, tmp_path / "p", "byte")


def test_framing_that_the_tokenizer_lacks_is_refused(tmp_path, corpus_file):
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"--append-eod: wanted a tokenizer with an end-of-text token, found hf_json"):
        preprocess(Corpus([corpus_file]), tmp_path / "p", tmp_path / "t.json", framing=DocumentMarkers(append_eod=True))


def test_a_worker_that_dies_ends_the_run_with_a_reason(tmp_path, corpus_file, monkeypatch):
    monkeypatch.setattr(module, "_tokenize_in_worker", end_process)
    with pytest.raises(DataError, match=r"a worker process died, .* try fewer than --workers 2"):
        preprocess(Corpus([corpus_file]), tmp_path / "p", "byte", workers=2)
    assert files_in(tmp_path) == []


def children_of(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in listed.stdout.split()]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_index_or_process_and_repeats(tmp_path, end):
    """The corpus is a pipe that never ends, so the command is surely at work when the signal comes."""
    fifo = tmp_path / "c.jsonl"
    os.mkfifo(fifo)
    command = [
        sys.executable,
        "tools/preprocess_data.py",
        "--input",
        str(fifo),
        "--tokenizer",
        "byte",
        "--workers",
        "2",
    ]
    command += ["--output-prefix", str(tmp_path / "p")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    with open(os.open(fifo, os.O_RDWR), "wb", buffering=0) as pipe:
        line = json.dumps({"text": "x" * 30_000}).encode() + b"\n"
        deadline = time.monotonic() + 60
        while not ((tmp_path / "p.bin.tmp").exists() and (tmp_path / "p.bin.tmp").stat().st_size):
            pipe.write(line)
            assert running.poll() is None, running.stderr.read()
            assert time.monotonic() < deadline
        workers = children_of(running.pid)
        assert len(workers) >= 2
        if end == signal.SIGINT:
            os.killpg(running.pid, end)
        else:
            os.kill(running.pid, end)
        os.set_blocking(pipe.fileno(), False)
        while running.poll() is None and time.monotonic() < deadline:
            # A signal that comes just before a read does not end it: a pipe that falls silent would hide the interrupt.
            with contextlib.suppress(BlockingIOError):
                pipe.write(b"\n")  # a longer line might be written in part, and then be a mistake of the corpus
            time.sleep(0.05)
    _, errors = running.communicate(timeout=300)
    assert running.returncode == (130 if end == signal.SIGINT else -end)
    if end == signal.SIGINT:
        assert errors.endswith("interrupted; run the same command again to go on\n")
        assert "Traceback" not in errors
    assert not (tmp_path / "p.idx").exists()
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)

    fifo.unlink()
    write_corpus(fifo)
    preprocess(Corpus([fifo]), tmp_path / "p", "byte")
    assert files_in(tmp_path) == ["c.jsonl", "p.bin", "p.idx", "p.json"]


def tool(name, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, f"tools/{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_the_two_commands_go_from_text_to_binaries(tmp_path, corpus_file):
    trained = tool("train_tokenizer", "--input", corpus_file, "--output", tmp_path / "tok", "--vocab-size", 300)
    assert (trained.returncode, trained.stderr) == (0, "")
    done = tool(
        *("preprocess_data", "--input", corpus_file, "--output-prefix", tmp_path / "p"),
        *("--tokenizer", tmp_path / "tok", "--append-eod"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "400 documents, " in done.stdout
    assert " tokens/s, " in done.stdout
    assert " bytes/token" in done.stdout

    again = tool("preprocess_data", "--input", corpus_file, "--output-prefix", tmp_path / "p", "--tokenizer", "byte")
    assert again.returncode == 2
    assert again.stderr == (
        f"error: {tmp_path}/p.bin: data are there already; choose another --output-prefix or give --overwrite\n"
    )
