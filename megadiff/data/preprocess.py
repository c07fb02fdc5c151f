"""Documents of a corpus to indexed binaries, in parallel processes, with progress.

The output does not depend on the number of workers. If a run ends early, for any reason, no `.idx` is left, and the
next run starts from the beginning. A long document is tokenized in pieces, so memory stays a small multiple of its
text.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from megadiff.data.conversations import ConversationOptions, encoder_of
from megadiff.data.corpus_streams import STDIN
from megadiff.data.documents import Corpus, CorpusReport, Document, InputFile, utf8_length
from megadiff.data.duplicates import find_repeats
from megadiff.data.indexed_format import (
    IndexedManifest,
    InputFacts,
    bin_path,
    idx_path,
    manifest_path,
    token_dtype,
    tokenizer_facts,
    wrong_ids,
)
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.tokenizers import Tokenizer, load_for_batches
from megadiff.errors import DataError

if TYPE_CHECKING:
    from rich.progress import Progress

CONTEXT = multiprocessing.get_context("spawn")
"""Way of starting them: forked children would share the locks of the tokenizer library's threads and of open files."""


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Start processes without SIGINT: they never see Ctrl-C, not even during imports; this process sees it afterwards.

    Ctrl-C reaches all processes of a terminal, but only the first process should end the others.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """Set a worker process up: it uses one thread of the tokenizer library, and ends when its parent does."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are already parallel
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent exits: a worker holds both ends of its queue and would otherwise wait forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_LINE_EVERY_S = 10.0

_BATCH_CHARACTERS = 2**19
_BATCH_DOCUMENTS = 2**12
_IN_FLIGHT_PER_WORKER = 3
_MOST_DOCUMENT_TOKENS = 2**31 - 1


class ProgressReport:
    """A progress report as a context manager; `update` may be called at any rate."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = max(1, total)
        self._next_line_s = time.monotonic() + _LINE_EVERY_S
        self._bar = _bar(what, self._total) if sys.stderr.isatty() else None

    def update(self, done: int, note: str) -> None:
        """Report the completed part of the total, and a note such as a speed."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)
        elif time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + _LINE_EVERY_S
            sys.stderr.write(f"{self._what}: {100 * min(1, done / self._total):.0f}% {note}\n")
            sys.stderr.flush()

    def __enter__(self) -> ProgressReport:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(what: str, total: int) -> Progress:
    """Return a bar on a terminal; the library of bars is imported for those alone."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
    bar.add_task(what, total=total, note="")
    return bar


@dataclass(frozen=True)
class DocumentMarkers:
    """Special tokens put around each document's tokens, and what documents are."""

    prepend_bos: bool = False
    append_eod: bool = False
    conversations: ConversationOptions | None = None
    """Conversations that the documents hold; None for plain text."""


@dataclass(frozen=True)
class PreprocessSummary:
    """Result of `preprocess`."""

    manifest: IndexedManifest
    report: CorpusReport
    elapsed_s: float


@dataclass(frozen=True)
class _Tokenized:
    """A batch's documents one after another."""

    ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray | None
    """Number of spans of each document, to which the lengths belong then; None for plain text."""
    source_bytes: int
    num_empty: int
    faults: list[tuple[int, str]]
    """Documents that could not be tokenized and are left out: (position in the batch, reason)."""


def preprocess(
    corpus: Corpus,
    prefix: str | Path,
    tokenizer_path: str | Path,
    *,
    framing: DocumentMarkers | None = None,
    workers: int = 1,
    backend: str = "tokenizers",
    tokenizer: Tokenizer | None = None,
    drop_duplicates: bool = False,
    overwrite: bool = False,
) -> PreprocessSummary:
    """Tokenize a corpus into `P.bin`, `P.idx` and `P.json`.

    Args:
        corpus: the text.
        prefix: P.
        tokenizer_path: as for `load_tokenizer`; each worker loads its own copy.
        framing: put bos before or eos after each document; nothing by default.
        workers: processes that tokenize; with 1, this process does, using the own threads of `tokenizers`.
        backend: library that encodes batches, `tokenizers` or `gigatoken`.
        tokenizer: the tokenizer as `chosen_backend` returned it, for this process; loaded by default.
        drop_duplicates: leave out documents whose text an earlier document has; reads the corpus twice.
        overwrite: replace finished data of the same prefix.

    Raises:
        DataError: before any work, the output cannot be written or exists already, or the tokenizer lacks bos or eos;
            during the work, a bad line or a document that cannot be tokenized exceeds the corpus's limit, a file is
            damaged, the disk is full, or a worker died.
    """
    if workers < 1:
        raise DataError(f"--workers must be at least 1, found {workers}")
    framing = framing or DocumentMarkers()
    tokenizer = tokenizer or load_for_batches(tokenizer_path, backend)
    refuse_framing(tokenizer, framing)
    _refuse_own_input(corpus, prefix)
    if drop_duplicates:
        refuse_read_once(corpus)
    started_s = time.monotonic()
    with (
        IndexedWriter(
            prefix, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, overwrite=overwrite
        ) as writer,
        ProgressReport("tokenizing", corpus.total_bytes) as progress,
    ):

        def show() -> None:
            progress.update(corpus.report.bytes_read, speed_note(writer.num_tokens, started_s))

        read_before = _find_repeats(corpus, prefix) if drop_duplicates else None
        batches = _tokenized(corpus, (str(tokenizer_path), backend, framing), tokenizer, workers)
        source_bytes = _add_batches(corpus, writer, batches, show)
        if read_before is not None:
            _refuse_changed(corpus, read_before)
        manifest = _finish(corpus, writer, tokenizer, framing, source_bytes)
    return PreprocessSummary(manifest, corpus.report, time.monotonic() - started_s)


def _refuse_own_input(corpus: Corpus, prefix: str | Path) -> None:
    """Refuse a prefix of which a file is one of the inputs, which would be replaced by it."""
    outputs = {os.path.realpath(path): path for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix))}
    for path in corpus.paths:
        if isinstance(path, Path) and (output := outputs.get(os.path.realpath(path))) is not None:
            raise DataError(
                f"{output}: wanted another file than an input, found one after --input; choose another --output-prefix"
            )


def refuse_read_once(corpus: Corpus) -> None:
    """Refuse inputs that cannot be read a second time.

    Raises:
        DataError: one is standard input or a pipe.
    """
    for path in corpus.paths:
        if path == STDIN or not path.is_file():
            found = "standard input" if path == STDIN else "a pipe"
            raise DataError(
                f"--input {path}: wanted a file for --drop-duplicates, which reads it twice, found {found}; write it "
                "to a file first"
            )


def _find_repeats(corpus: Corpus, prefix: str | Path) -> list[InputFile]:
    """Set which documents of the corpus are left out as duplicates; return the files as they were read."""
    with ProgressReport("looking for duplicates", corpus.total_bytes) as progress:
        corpus.duplicates = ()
        corpus.duplicates = find_repeats(
            corpus, Path(f"{prefix}.duplicates.tmp"), lambda: progress.update(corpus.report.bytes_read, "")
        )
    return corpus.report.files


def _refuse_changed(corpus: Corpus, before: list[InputFile]) -> None:
    """Refuse files whose duplicates were found in another content."""
    for path, then, now in zip(corpus.paths, before, corpus.report.files, strict=True):
        if then != now:
            raise DataError(f"{path}: changed while it was read; repeat the command when nobody writes the file")


def tokenize_part(
    corpus: Corpus,
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    framing: DocumentMarkers,
    show: Callable[[int], None],
) -> IndexedManifest | None:
    """Tokenize one part of a corpus in this process into `P.bin`, `P.idx` and `P.json`.

    Args:
        corpus: the part; its report counts what was read.
        prefix: P.
        tokenizer: the tokenizer, which has the tokens that `framing` needs.
        framing: tokens to put around each document.
        show: function that is called after each batch with the number of tokens written so far.

    Returns:
        The manifest; None, and no files, if the part has no document with a token.

    Raises:
        DataError: as for `preprocess`.
    """
    with IndexedWriter(prefix, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id) as writer:
        batches = _tokenized(corpus, ("", "", framing), tokenizer, workers=1)
        source_bytes = _add_batches(corpus, writer, batches, lambda: show(writer.num_tokens))
        if not writer.num_documents:
            return None
        return _finish(corpus, writer, tokenizer, framing, source_bytes)


def speed_note(tokens: int, started_s: float) -> str:
    """Return the number of tokens and their speed since a time of the monotonic clock, as progress shows them."""
    return f"{tokens:,} tokens, {tokens / max(1e-9, time.monotonic() - started_s):,.0f} tokens/s"


def _add_batches(corpus: Corpus, writer: IndexedWriter, batches: Iterable[_Tokenized], show: Callable[[], None]) -> int:
    """Write all batches; return the number of UTF-8 bytes of their text."""
    source_bytes = 0
    for batch in batches:
        writer.add_documents(batch.ids, batch.lengths, batch.spans)
        source_bytes += batch.source_bytes
        corpus.report.empty_documents += batch.num_empty
        corpus.report.documents -= batch.num_empty
        show()
    return source_bytes


def _finish(
    corpus: Corpus, writer: IndexedWriter, tokenizer: Tokenizer, framing: DocumentMarkers, source_bytes: int
) -> IndexedManifest:
    return writer.finish(
        tokenizer=tokenizer_facts(tokenizer),
        source_bytes=source_bytes,
        inputs=[InputFacts(name=file.name, bytes=file.bytes, sha256=file.sha256) for file in corpus.report.files],
        appended_eod=framing.append_eod,
        prepended_bos=framing.prepend_bos,
        chat_template=None if framing.conversations is None else framing.conversations.template_sha256,
    )


def refuse_framing(tokenizer: Tokenizer, framing: DocumentMarkers) -> None:
    """Refuse to put a token around documents that the tokenizer lacks, or conversations without a chat template.

    Raises:
        DataError: something is missing; the message names the option.
    """
    for flag, asked, token_id, what in (
        ("--append-eod", framing.append_eod, tokenizer.eos_id, "an end-of-text token"),
        ("--prepend-bos", framing.prepend_bos, tokenizer.bos_id, "a begin-of-text token"),
    ):
        if asked and token_id is None:
            raise DataError(f"{flag}: wanted a tokenizer with {what}, found {tokenizer.name} without; drop {flag}")
    if (options := framing.conversations) is not None:
        encoder_of(tokenizer, options, prepend_bos=framing.prepend_bos, append_eod=framing.append_eod)


def _tokenized(
    corpus: Corpus, setup: tuple[str, str, DocumentMarkers], tokenizer: Tokenizer, workers: int
) -> Iterator[_Tokenized]:
    """Yield tokenized batches in order; count faulty documents as bad lines of the corpus."""
    framing = setup[2]
    batches = _batches(corpus.located_documents())
    if workers == 1:
        for batch in batches:
            tokenized = _tokenize(tokenizer, framing, [document.text for document in batch])
            _skip_faults(corpus, batch, tokenized)
            del batch
            yield tokenized
        return
    pool = ProcessPoolExecutor(workers, mp_context=CONTEXT, initializer=_start_worker, initargs=setup)
    try:
        for batch, tokenized in _in_order(pool, batches, workers * _IN_FLIGHT_PER_WORKER):
            _skip_faults(corpus, batch, tokenized)
            yield tokenized
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process died, most likely out of memory; try fewer than --workers {workers}"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _skip_faults(corpus: Corpus, batch: Sequence[Document], tokenized: _Tokenized) -> None:
    for place, reason in tokenized.faults:
        corpus.skip(batch[place], reason)


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterator[list[Document]], in_flight: int
) -> Iterator[tuple[list[Document], _Tokenized]]:
    """Yield each batch with its tokens; at most `in_flight` are in progress, fewer if they hold long documents."""
    waiting: deque[tuple[list[Document], int, Future[_Tokenized]]] = deque()
    characters = 0
    for batch in batches:
        texts = [document.text for document in batch]
        size = sum(map(len, texts))
        while waiting and (len(waiting) >= in_flight or characters + size > 2 * in_flight * _BATCH_CHARACTERS):
            before, taken, future = waiting.popleft()
            characters -= taken
            yield before, future.result()
        with interrupts_held_back():  # submitting starts workers, one at a time as they are needed
            waiting.append((batch, size, pool.submit(_tokenize_in_worker, texts)))
        characters += size
    while waiting:
        before, _, future = waiting.popleft()
        yield before, future.result()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenize(tokenizer: Tokenizer, framing: DocumentMarkers, texts: Sequence[str]) -> _Tokenized:
    """Tokenize a batch; a document whose text yields no token (all of it normalised away) is left out."""
    if framing.conversations is not None:
        return _tokenize_conversations(tokenizer, framing, framing.conversations, texts)
    if (together := _tokenize_together(tokenizer, framing, texts)) is not None:
        return together
    ids = _Ids(tokenizer, framing)
    faults: list[tuple[int, str]] = []
    source_bytes = num_empty = 0
    for place, (text, pieces) in enumerate(zip(texts, _encoded(tokenizer, texts), strict=True)):
        try:
            if ids.add(pieces):
                source_bytes += utf8_length(text)
            else:
                num_empty += 1
        except DataError as error:
            faults.append((place, str(error)))
    return _Tokenized(*ids.taken(), None, source_bytes, num_empty, faults)


def _tokenize_together(tokenizer: Tokenizer, framing: DocumentMarkers, texts: Sequence[str]) -> _Tokenized | None:
    """Tokenize a batch by a tokenizer that gives arrays; None where a text is long or at fault, and for another one."""
    encode_arrays = getattr(tokenizer, "encode_arrays", None)
    if encode_arrays is None or any(len(text) >= _BATCH_CHARACTERS for text in texts):
        return None
    try:
        found: list[np.ndarray] = encode_arrays(texts)
    except DataError:
        return None  # the text at fault is found when each is encoded alone
    kept = [ids for ids in found if ids.size]
    before = [np.array([tokenizer.bos_id], dtype=np.uint32)] if framing.prepend_bos else []
    after = [np.array([tokenizer.eos_id], dtype=np.uint32)] if framing.append_eod else []
    parts = [part for ids in kept for part in (*before, ids, *after)] if before or after else kept
    together = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)
    if wrong_ids(together, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id).size:
        return None
    lengths = np.array([ids.size for ids in kept], dtype=np.int64) + len(before) + len(after)
    source_bytes = sum(utf8_length(text) for text, ids in zip(texts, found, strict=True) if ids.size)
    stored = together.astype(token_dtype(tokenizer.vocab_size))
    return _Tokenized(stored, lengths, None, source_bytes, len(texts) - len(kept), [])


def _tokenize_conversations(
    tokenizer: Tokenizer, framing: DocumentMarkers, options: ConversationOptions, records: Sequence[str]
) -> _Tokenized:
    """Tokenize a batch of records; a record whose conversation cannot be used is a fault as a whole."""
    encoder = encoder_of(tokenizer, options, prepend_bos=framing.prepend_bos, append_eod=framing.append_eod)
    ids, spans = _Ids(tokenizer, DocumentMarkers()), array("i")
    faults: list[tuple[int, str]] = []
    source_bytes = 0
    for place, record in enumerate(records):
        try:
            conversations = list(encoder.encode(record))
            parts = [conversation.spans() for conversation in conversations]
            ids.add_spans([span for part in parts for span in part])
        except DataError as error:
            faults.append((place, str(error)))
            continue
        spans.extend(len(part) for part in parts)
        source_bytes += sum(conversation.num_bytes for conversation in conversations)
    return _Tokenized(*ids.taken(), np.array(spans, dtype=np.int64), source_bytes, 0, faults)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Iterable[list[int]]]:
    """Yield the ids of each text in pieces: ordinary texts together in one call, long ones lazily."""
    ordinary = [text for text in texts if len(text) < _BATCH_CHARACTERS]
    try:
        together = iter(tokenizer.encode_batch(ordinary))
    except DataError:
        together = None  # one of them is faulty, and is found when each is encoded alone
    for text in texts:
        is_ordinary = together is not None and len(text) < _BATCH_CHARACTERS
        yield [next(together)] if together is not None and is_ordinary else tokenizer.encode_pieces(text)


class _Ids:
    """Token ids of documents, one after another, in their stored type."""

    def __init__(self, tokenizer: Tokenizer, framing: DocumentMarkers) -> None:
        self._vocab_size, self._mask_id = tokenizer.vocab_size, tokenizer.mask_id
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._before = [tokenizer.bos_id] if framing.prepend_bos else []
        self._after = [tokenizer.eos_id] if framing.append_eod else []
        self._ids = array(np.dtype(self._dtype).char)
        self._lengths: list[int] = []

    def add(self, pieces: Iterable[list[int]]) -> bool:
        """Add a document with its frame; return False, adding nothing, if it has no token of its own.

        Raises:
            DataError: it cannot be tokenized, has too many tokens, or an id that text must not have; nothing is added.
        """
        start = len(self._ids)
        try:
            self._extend(self._before)
            for piece in pieces:
                self._extend(piece)
                if len(self._ids) - start > _MOST_DOCUMENT_TOKENS - len(self._after):
                    raise DataError(f"it has more than {_MOST_DOCUMENT_TOKENS} tokens, the most that an index allows")
        except DataError:
            del self._ids[start:]
            raise
        if len(self._ids) == start + len(self._before):
            del self._ids[start:]
            return False
        self._extend(self._after)
        self._lengths.append(len(self._ids) - start)
        return True

    def add_spans(self, spans: Sequence[list[int]]) -> None:
        """Add spans, each with a length of its own, which may be 0.

        Raises:
            DataError: one has an id that text must not have; nothing is added.
        """
        start = len(self._ids)
        try:
            for span in spans:
                self._extend(span)
        except DataError:
            del self._ids[start:]
            raise
        self._lengths.extend(map(len, spans))

    def taken(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all ids, and the number of ids in each document."""
        return np.frombuffer(self._ids, dtype=self._dtype), np.array(self._lengths, dtype=np.int64)

    def _extend(self, piece: Sequence[int | None]) -> None:
        if not piece:
            return
        found = np.array(piece, dtype=np.int64)
        wrong = wrong_ids(found, vocab_size=self._vocab_size, mask_id=self._mask_id)
        if wrong.size:
            token = int(found[wrong[0]])
            what = "the mask, which no text may hold" if token == self._mask_id else f"not 0 to {self._vocab_size - 1}"
            raise DataError(f"the tokenizer gives it the id {token} ({what})")
        self._ids.frombytes(found.astype(self._dtype).tobytes())


_worker_setup: tuple[Tokenizer, DocumentMarkers] | None = None


def _start_worker(tokenizer_path: str, backend: str, framing: DocumentMarkers) -> None:
    global _worker_setup
    begin_worker()
    _worker_setup = (load_for_batches(tokenizer_path, backend), framing)


def _tokenize_in_worker(texts: list[str]) -> _Tokenized:
    assert _worker_setup is not None, "the pool starts every worker with _start_worker"
    return _tokenize(*_worker_setup, texts)
