"""Statistics of indexed data, from one pass over all of its tokens: sizes, lengths, repeated documents, entropy.

`scan` checks whether data can be used; these figures describe what is in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from megadiff.data.baselines import bigram_entropy, entropy
from megadiff.data.indexed_format import TokenizerFacts
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.tokenizers import Tokenizer, token_texts
from megadiff.errors import DataError

PERCENTILES = (0, 10, 50, 90, 99, 100)
"""Percentiles of the documents' lengths that are reported."""

_BATCH_TOKENS = 2**20
_MOST_IDS = 2**24
_REPEATED_SHOWN = 3
_FREQUENT_SHOWN = 10

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class RepeatedDocument:
    """A document that a source holds more than once."""

    first: int
    """Index of the first of them."""
    times: int
    tokens: int
    """Number of tokens of one of them."""


@dataclass(frozen=True)
class LengthBin:
    """A bin of the histogram of document lengths."""

    shortest: int
    """Least number of tokens, included."""
    longest: int
    """Largest number of tokens, included."""
    documents: int
    tokens: int
    """Number of tokens in all its documents."""


@dataclass(frozen=True)
class SourceStatistics:
    """Statistics of one source."""

    prefix: str
    documents: int
    empty_documents: int
    tokens: int
    answer_tokens: int | None
    """Number of tokens in the answers of conversations; None of text."""
    source_bytes: int | None
    """Number of UTF-8 bytes of the text; None without a manifest."""
    vocab_size: int
    """Number of ids of the tokenizer, the mask included; without one, the largest id in the source plus 1."""
    used_ids: int
    """Number of different ids in the source."""
    padding_tokens: int
    """Number of tokens with the padding id; 0 where that is unknown, or the mask."""
    begin_with_bos: int
    """Number of documents whose first token is bos."""
    end_with_eos: int
    """Number of documents whose last token is eos."""
    lengths: tuple[int, ...]
    """Lengths in tokens at the `PERCENTILES` of the documents that have tokens."""
    histogram: tuple[LengthBin, ...]
    """Bins whose bounds are powers of two, from the first to the last that has a document."""
    repeats: int
    """Number of documents that equal an earlier one of the source, empty ones not counted."""
    repeated_tokens: int
    """Number of tokens of those documents."""
    most_repeated: tuple[RepeatedDocument, ...]
    also_in: dict[str, int]
    """Number of documents, repeats included, that earlier sources of the same command hold too, by prefix."""
    unigram: float
    """Entropy of the frequencies of all tokens, in nats per token."""
    bigram: float | None
    """Cross-entropy of a smoothed bigram model (`baselines.bigram_entropy`), in nats per token."""
    most_frequent: tuple[tuple[int, int], ...]
    """The most frequent ids, each with its number of tokens."""

    @property
    def bytes_per_token(self) -> float | None:
        """Number of bytes of text per token."""
        return self.source_bytes / self.tokens if self.source_bytes else None


def statistics_of(
    readers: Sequence[IndexedReader],
    tokenizer: TokenizerFacts | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[SourceStatistics]:
    """Return the statistics of sources, in their order.

    Memory is a small multiple of the largest document, and 20 bytes a document.

    Args:
        readers: sources of different prefixes.
        tokenizer: the tokenizer of all of them; by default the one in each manifest.
        progress: called with the number of tokens read so far.

    Raises:
        DataError: tokens cannot be read, or are not in the vocabulary.
    """
    found: list[SourceStatistics] = []
    earlier: list[tuple[str, Hashes]] = []
    before = 0
    for reader in readers:
        facts = tokenizer or (reader.manifest.tokenizer if reader.manifest else None)
        counted = _Counted(reader, facts, lambda done, before=before: progress(before + done))
        hashes = np.unique(counted.hashes[counted.lengths > 0])
        found.append(counted.statistics({prefix: counted.shared_with(others) for prefix, others in earlier}))
        earlier.append((reader.prefix, hashes))
        before += reader.num_tokens
    return found


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document, for people to read."""

    document: int
    tokens: int
    """Number of tokens of the document."""
    shown: int
    """Number of tokens of the excerpt."""
    text: str
    """Their text with the names of special tokens; without a tokenizer, their ids. Of conversations, what is given to
    the model lies between « and »."""


def excerpts(
    reader: IndexedReader, documents: Sequence[int], *, tokens: int, tokenizer: Tokenizer | None
) -> list[Excerpt]:
    """Return the first `tokens` tokens of documents.

    Raises:
        DataError: there is no such document, or its tokens cannot be read.
    """
    found = []
    for document in documents:
        if not 0 <= document < reader.num_documents:
            raise DataError(
                f"{reader.prefix}: wanted document {document}, found the documents 0 to {reader.num_documents - 1:,}; "
                "give one of them"
            )
        ids = reader.document(document)
        first = ids[:tokens].tolist()
        texts, between = (
            ([f"{token}" for token in first], " ") if tokenizer is None else (token_texts(tokenizer, first), "")
        )
        text = between.join(texts)
        if reader.has_spans:
            runs = groupby(zip(reader.answers(document)[:tokens], texts, strict=True), key=lambda pair: pair[0])
            parts = [(is_answer, between.join(text for _, text in run)) for is_answer, run in runs]
            text = between.join(part if is_answer else f"«{part}»" for is_answer, part in parts)
        found.append(Excerpt(document, ids.size, len(first), text))
    return found


def evenly(total: int, wanted: int) -> list[int]:
    """Return up to `wanted` of the numbers 0 .. total - 1, spread evenly from the first on."""
    number = min(wanted, total)
    return [total * place // number for place in range(number)]


class _Counted:
    """Everything that one pass over a source counts."""

    def __init__(
        self, reader: IndexedReader, tokenizer: TokenizerFacts | None, progress: Callable[[int], None]
    ) -> None:
        self._reader, self._tokenizer = reader, tokenizer
        if tokenizer is not None:
            reader.check_vocabulary(tokenizer.vocab_size, mask_id=tokenizer.mask_id)
        self.lengths = np.zeros(reader.num_documents, dtype=np.int64)
        self.hashes: Hashes = np.zeros(reader.num_documents, dtype=np.uint64)
        self._counts = np.zeros(tokenizer.vocab_size if tokenizer else 1, dtype=np.int64)
        self._begin_with_bos = self._end_with_eos = self._answer_tokens = 0
        waiting: list[npt.NDArray[np.int64]] = []
        size = done = 0
        for document in range(reader.num_documents):
            ids = reader.document(document)
            self._look(document, ids)
            waiting.append(ids)
            size += ids.size
            if size >= _BATCH_TOKENS or document == reader.num_documents - 1:
                self._count(np.concatenate(waiting))
                done += size
                waiting, size = [], 0
                progress(done)

    def _look(self, document: int, ids: npt.NDArray[np.int64]) -> None:
        self.lengths[document] = ids.size
        if self._reader.has_spans:
            self._answer_tokens += int(self._reader.answers(document).sum())
        self.hashes[document] = int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
        if self._tokenizer is not None and ids.size:
            self._begin_with_bos += int(ids[0]) == self._tokenizer.bos_id
            self._end_with_eos += int(ids[-1]) == self._tokenizer.eos_id

    def _count(self, ids: npt.NDArray[np.int64]) -> None:
        if ids.size and int(ids.max()) >= _MOST_IDS:
            raise DataError(
                f"{self._reader.prefix}: wanted token ids below {_MOST_IDS:,}, found {int(ids.max())}, which no "
                "tokenizer has; give --tokenizer, or examine the file with `megadiff check_data`"
            )
        counts = np.bincount(ids, minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts

    def shared_with(self, others: Hashes) -> int:
        """Return the number of documents with tokens whose hashes are among those of another source."""
        return int(np.isin(self.hashes[self.lengths > 0], others).sum())

    def statistics(self, also_in: dict[str, int]) -> SourceStatistics:
        """Return the figures of the source."""
        reader, facts, counts = self._reader, self._tokenizer, self._counts
        lengths = self.lengths[self.lengths > 0]
        repeats, repeated_tokens, most_repeated = self._repeats()
        pad_id = facts.pad_id if facts is not None and facts.pad_id != facts.mask_id else None
        frequent = np.argsort(-counts, kind="stable")[:_FREQUENT_SHOWN].tolist()
        return SourceStatistics(
            prefix=reader.prefix,
            documents=reader.num_documents,
            empty_documents=reader.num_documents - lengths.size,
            tokens=reader.num_tokens,
            answer_tokens=self._answer_tokens if reader.has_spans else None,
            source_bytes=reader.manifest.source_bytes if reader.manifest else None,
            vocab_size=len(counts),
            used_ids=int(np.count_nonzero(counts)),
            padding_tokens=int(counts[pad_id]) if pad_id is not None else 0,
            begin_with_bos=self._begin_with_bos,
            end_with_eos=self._end_with_eos,
            lengths=tuple(np.percentile(lengths, PERCENTILES, method="lower").tolist()),
            histogram=_histogram(lengths),
            repeats=repeats,
            repeated_tokens=repeated_tokens,
            most_repeated=most_repeated,
            also_in={prefix: shared for prefix, shared in also_in.items() if shared},
            unigram=entropy(counts / counts.sum()),
            bigram=bigram_entropy(reader, vocab_size=len(counts)),
            most_frequent=tuple((token, int(counts[token])) for token in frequent if counts[token]),
        )

    def _repeats(self) -> tuple[int, int, tuple[RepeatedDocument, ...]]:
        """Return the number of repeats, their tokens, and the documents that occur most often."""
        places = np.flatnonzero(self.lengths)
        _, first, times = np.unique(self.hashes[places], return_index=True, return_counts=True)
        first = places[first]
        tokens = self.lengths[first]
        often = [place for place in np.lexsort((first, -times))[:_REPEATED_SHOWN].tolist() if times[place] > 1]
        most = tuple(RepeatedDocument(int(first[place]), int(times[place]), int(tokens[place])) for place in often)
        return int((times - 1).sum()), int(((times - 1) * tokens).sum()), most


def _histogram(lengths: npt.NDArray[np.int64]) -> tuple[LengthBin, ...]:
    """Return the bins 1, 2 to 3, 4 to 7, ... of lengths of at least 1, from the first to the last that is not empty."""
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    bins = range(int(exponents.min()), int(exponents.max()) + 1)
    documents = np.bincount(exponents, minlength=bins.stop)
    tokens = np.bincount(exponents, weights=lengths, minlength=bins.stop)
    return tuple(LengthBin(2**n, 2 ** (n + 1) - 1, int(documents[n]), int(tokens[n])) for n in bins)
