"""A corpus to indexed tokens: documents are read in one process, tokenized in several, and written in their order.

The output does not depend on the number of workers. Whatever ends a run early, no `.idx` is left, and the next run
starts from the beginning.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadiff.data.documents import Corpus, CorpusReport
from megadiff.data.indexed_format import token_dtype
from megadiff.data.indexed_manifest import IndexedManifest, InputFacts, tokenizer_facts
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.progress import ProgressReport
from megadiff.data.tokenizer_files import load_tokenizer
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import DataError

_BATCH_CHARACTERS = 2**19
_BATCH_DOCUMENTS = 2**12
_IN_FLIGHT_PER_WORKER = 3


@dataclass(frozen=True)
class Framing:
    """What is put around each document's tokens."""

    prepend_bos: bool = False
    append_eod: bool = False


@dataclass(frozen=True)
class PreprocessSummary:
    """What `preprocess` did."""

    manifest: IndexedManifest
    report: CorpusReport
    elapsed_s: float


@dataclass(frozen=True)
class _Tokenized:
    """A batch's documents one after another."""

    ids: np.ndarray
    lengths: np.ndarray
    source_bytes: int
    num_empty: int


def preprocess(
    corpus: Corpus,
    prefix: str | Path,
    tokenizer_path: str | Path,
    *,
    framing: Framing | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> PreprocessSummary:
    """Tokenize a corpus into `P.bin`, `P.idx` and `P.json`.

    Args:
        corpus: the text.
        prefix: P.
        tokenizer_path: as for `load_tokenizer`; each worker loads it anew.
        framing: put bos before or eos after each document; nothing by default.
        workers: processes that tokenize; with 1, this one does, and the library's own threads help.
        overwrite: replace finished data of the same prefix.

    Raises:
        DataError: before any work: the output cannot be written or is there, the tokenizer lacks bos or eos. During
            it: a bad line beyond the corpus's limit, a damaged file, a full disk, a dead worker.
    """
    if workers < 1:
        raise DataError(f"--workers must be at least 1, found {workers}")
    framing = framing or Framing()
    tokenizer = load_tokenizer(tokenizer_path)
    _refuse_framing(tokenizer, framing)
    started_s = time.monotonic()
    with IndexedWriter(
        prefix, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, overwrite=overwrite
    ) as writer:
        source_bytes = 0
        with ProgressReport("tokenizing", corpus.total_bytes) as progress:
            for batch in _tokenized(corpus, str(tokenizer_path), tokenizer, framing, workers):
                writer.add_documents(batch.ids, batch.lengths)
                source_bytes += batch.source_bytes
                corpus.report.empty_documents += batch.num_empty
                corpus.report.documents -= batch.num_empty
                speed = writer.num_tokens / max(1e-9, time.monotonic() - started_s)
                progress.update(corpus.report.bytes_read, f"{writer.num_tokens:,} tokens, {speed:,.0f} tokens/s")
        report = corpus.report
        manifest = writer.finish(
            tokenizer=tokenizer_facts(tokenizer),
            source_bytes=source_bytes,
            inputs=[InputFacts(name=file.name, bytes=file.bytes, sha256=file.sha256) for file in report.files],
            appended_eod=framing.append_eod,
            prepended_bos=framing.prepend_bos,
        )
    return PreprocessSummary(manifest, report, time.monotonic() - started_s)


def _refuse_framing(tokenizer: Tokenizer, framing: Framing) -> None:
    for flag, asked, token_id, what in (
        ("--append-eod", framing.append_eod, tokenizer.eos_id, "an end-of-text token"),
        ("--prepend-bos", framing.prepend_bos, tokenizer.bos_id, "a begin-of-text token"),
    ):
        if asked and token_id is None:
            raise DataError(f"{flag}: wanted a tokenizer with {what}, found {tokenizer.name} without; drop {flag}")


def _tokenized(
    corpus: Corpus, tokenizer_path: str, tokenizer: Tokenizer, framing: Framing, workers: int
) -> Iterator[_Tokenized]:
    batches = _batches(corpus.documents())
    if workers == 1:
        for texts in batches:
            yield _tokenize(tokenizer, framing, texts)
        return
    # "spawn": forked children would share the tokenizer library's threads' locks and the output file's lock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer_path, framing)
    )
    try:
        yield from _in_order(pool, batches, workers * _IN_FLIGHT_PER_WORKER)
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process died, which is mostly for want of memory; try fewer than --workers {workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, batches: Iterator[list[str]], in_flight: int) -> Iterator[_Tokenized]:
    waiting: deque[Future[_Tokenized]] = deque()
    for texts in batches:
        with _interrupts_held_back():  # submitting starts workers, one at a time as they are needed
            waiting.append(pool.submit(_tokenize_in_worker, texts))
        if len(waiting) >= in_flight:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started within never see Ctrl-C, not even while they import; this one sees it afterwards.

    Ctrl-C reaches all processes of a terminal, and it is for the first one to end the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenize(tokenizer: Tokenizer, framing: Framing, texts: Sequence[str]) -> _Tokenized:
    """Tokenize a batch; a document whose text yields no token (all of it normalised away) is left out."""
    before = [tokenizer.bos_id] if framing.prepend_bos else []
    after = [tokenizer.eos_id] if framing.append_eod else []
    dtype = token_dtype(tokenizer.vocab_size)
    parts: list[np.ndarray] = []
    source_bytes = 0
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if ids:
            parts.append(np.array(before + ids + after, dtype=dtype))
            source_bytes += len(text.encode("utf-8"))
    joined = np.concatenate(parts) if parts else np.empty(0, dtype=dtype)
    lengths = np.array([part.size for part in parts], dtype=np.int64)
    return _Tokenized(joined, lengths, source_bytes, num_empty=len(texts) - len(parts))


_worker_setup: tuple[Tokenizer, Framing] | None = None


def _start_worker(tokenizer_path: str, framing: Framing) -> None:
    global _worker_setup
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_setup = (load_tokenizer(tokenizer_path), framing)


def _end_with_parent() -> None:
    """A worker holds both ends of its queue and would wait for ever after its parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_in_worker(texts: list[str]) -> _Tokenized:
    assert _worker_setup is not None, "the pool starts every worker with _start_worker"
    return _tokenize(*_worker_setup, texts)
