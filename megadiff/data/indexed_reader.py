"""Reader of indexed tokens, this package's or Megatron's, that first checks every field and bound of the index.

Everything is read with `pread` into fresh arrays (`indexed_format`): no array is a view of a mapped file, a file that
shrinks while it is read causes an error instead of a signal, and other threads can run meanwhile.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from megadiff.config.suggestions import similar_path
from megadiff.data.indexed_format import (
    CHUNK,
    DTYPES,
    HEADER,
    MAGIC,
    REMEDY,
    TOKENS,
    VERSION,
    JoinedFile,
    StoredFile,
    StoredIntegers,
    bin_path,
    idx_path,
    manifest_path,
    read_manifest,
    shard_folder,
    shard_prefixes,
    without_suffix,
    wrong_ids,
)
from megadiff.errors import DataError

_EVEN_SPANS, _EVEN_SPAN_TOKENS = 64, 2**14
_RANDOM_SPANS, _RANDOM_SPAN_TOKENS = 256, 2**10
_MOST_TOKENS = 2**56  # far below the point where a sum of lengths, or a byte offset, overflows 64 bits


class IndexedReader:
    """The documents, and the flat token stream, of one prefix or one folder of shards.

    Args:
        prefix: P, `P.bin` or `P.idx`; or a finished folder of shards, which is read as if they were one file.

    Raises:
        DataError: a file is missing, truncated or damaged, or the manifest belongs to other data.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = without_suffix(prefix)
        folder = shard_folder(self.prefix)
        index = self.prefix
        if folder is not None:
            self.prefix, index = str(folder), str(folder / TOKENS)
        self._refuse_missing(folder)
        self._idx = StoredFile(idx_path(index))
        self._manifest_path = manifest_path(index)
        self.manifest = read_manifest(self._manifest_path)
        self.dtype, self.num_sequences, self.num_documents = self._checked_header()
        self._open_index()
        self.num_tokens = self._checked_lengths()
        self._check_documents()
        self._check_manifest()
        self._bin = StoredFile(bin_path(self.prefix)) if folder is None else _joined(folder)
        self._check_bin_size()
        self.stored_tokens = StoredIntegers(self._bin, self.dtype, offset=0, count=self.num_tokens)
        self._vocab_size, self._mask_id = None, None

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Fingerprint of the tokenizer that made the ids; None without a manifest."""
        return self.manifest.tokenizer.fingerprint if self.manifest else None

    @property
    def prepended_bos(self) -> bool:
        """Whether every document is known to begin with bos; False without a manifest, where this is unknown."""
        return self.manifest is not None and self.manifest.prepended_bos

    @property
    def bytes_per_token(self) -> float | None:
        """Number of UTF-8 bytes of text per token, for bits per byte; None without a manifest."""
        return self.manifest.source_bytes / self.manifest.tokens if self.manifest else None

    @property
    def has_spans(self) -> bool:
        """Whether documents are conversations, of which only the answers are predicted (`IndexedManifest.spans`)."""
        return self.manifest is not None and self.manifest.spans is not None

    @property
    def chat_template(self) -> str | None:
        """SHA-256 (hex) of the chat template that made text of messages; None without one, or if that is not known."""
        return None if self.manifest is None else self.manifest.chat_template

    @property
    def files(self) -> tuple[StoredFile, StoredFile]:
        """The open files `P.bin` and `P.idx`."""
        return self._bin, self._idx

    def tokens(self, offset: int, count: int) -> np.ndarray:
        """Return `count` tokens of the stream from `offset` on, across document ends: [count] int64, a fresh array.

        Raises:
            DataError: an id is negative or, after `check_vocabulary`, not in the vocabulary; or the disk fails.
        """
        if offset < 0 or count < 0 or offset + count > self.num_tokens:
            raise IndexError(f"tokens {offset} to {offset + count} are outside 0 to {self.num_tokens} of {self.prefix}")
        ids = self.stored_tokens.read(offset, count)
        wrong = wrong_ids(ids, vocab_size=self._vocab_size, mask_id=self._mask_id)
        if wrong.size:
            raise self._wrong_token(offset + int(wrong[0]), int(ids[wrong[0]]))
        return ids.astype(np.int64)

    def document(self, index: int) -> np.ndarray:
        """Return all tokens of a document: [n] int64, a fresh array."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} is outside 0 to {self.num_documents - 1} of {self.prefix}")
        first, last = self._documents.read(index, 2).tolist()
        start = self._token_offset(first)
        return self.tokens(start, self._token_offset(last) - start)

    def answers(self, index: int) -> np.ndarray:
        """Return which tokens of a document belong to answers, [n] bool; all of them where documents have no spans."""
        first, last = self._documents.read(index, 2).tolist()
        lengths = self._lengths.read(first, last - first)
        return np.repeat(np.arange(lengths.size) % 2 == 1 if self.has_spans else True, lengths)

    def conversation_starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first token of each conversation in the stream, and the length of what precedes its first answer.

        Both are [documents] int64.
        """
        boundaries = np.concatenate([part for _, part in self._documents.chunks()])[:-1].astype(np.int64)
        prompts = np.zeros(boundaries.size, dtype=np.int64)  # 0 in a document of no sequence
        for start, lengths in self._lengths.chunks():
            low, high = np.searchsorted(boundaries, (start, start + lengths.size))
            prompts[low:high] = lengths[boundaries[low:high] - start]
        return self._byte_offsets(boundaries) // self.dtype.itemsize, prompts

    def locate(self, token: int) -> tuple[int, int]:
        """Return the document that holds a token of the stream, and the token's position in it."""
        sequence = self._pointers.last_at_most(token * self.dtype.itemsize)
        document = self._documents.last_at_most(sequence)
        return document, token - self._token_offset(self._documents.at(document))

    def empty_documents(self) -> tuple[int, int | None]:
        """Return the number of documents without tokens, and the first of them.

        Megatron's files may have such documents, of no sequence or of empty sequences; this package writes none.
        """
        count, first = 0, None
        for start, part in self._documents.chunks(overlap=1):
            offsets = self._byte_offsets(part)
            is_empty = offsets[1:] == offsets[:-1]
            if first is None and is_empty.any():
                first = start + int(is_empty.argmax())
            count += int(np.count_nonzero(is_empty))
        return count, first

    def _byte_offsets(self, sequences: np.ndarray) -> np.ndarray:
        """Return the byte offsets in the `.bin` at which sequences ([n], in ascending order) begin: [n] int64."""
        offsets = np.full(sequences.size, self.num_tokens * self.dtype.itemsize, dtype=np.int64)
        first, last = int(sequences[0]), min(int(sequences[-1]) + 1, self.num_sequences)
        for start in range(first, last, CHUNK):
            end = min(start + CHUNK, last)
            low, high = np.searchsorted(sequences, (start, end))
            offsets[low:high] = self._pointers.read(start, end - start)[sequences[low:high] - start]
        return offsets

    def check_vocabulary(self, vocab_size: int, *, mask_id: int | None = None, full: bool = False) -> None:
        """Search for ids outside a model's vocabulary, in spans spread over the file or in all of it.

        From then on `tokens` refuses such ids wherever they are read, so none is trained on.

        Args:
            vocab_size: V; ids must lie in 0 .. V - 1.
            mask_id: an id that clean text must not contain.
            full: whether to read the whole file.

        Raises:
            DataError: one is found; the message names the document and the position in it.
        """
        self._vocab_size, self._mask_id = vocab_size, mask_id
        for offset, count in self._all_spans() if full else [*self._even_spans(), *self._random_spans()]:
            self.tokens(offset, count)

    def content_fingerprint(self) -> str:
        """Return a SHA-256 (hex) that identifies the content; paths and times play no part.

        It covers every byte of the `.idx`, the tokenizer, the size of the `.bin`, its SHA-256 according to the
        manifest, and its tokens in 64 even spans: all of them up to 2**20 tokens. A byte changed elsewhere in a larger
        `.bin` that kept its manifest is found by `megadiff check_data`.
        """
        facts = (self.dtype.name, self.num_sequences, self.num_documents, self.num_tokens, self.tokenizer_fingerprint)
        recorded = self.manifest.bin_sha256 if self.manifest else None
        digest = hashlib.sha256(repr((*facts, recorded, self._idx.sha256())).encode())
        for offset, count in self._even_spans():
            digest.update(self.stored_tokens.read(offset, count).tobytes())
        return digest.hexdigest()

    def _wrong_token(self, token: int, found: int) -> DataError:
        document, within = self.locate(token)
        limit = "0 or more" if self._vocab_size is None else f"0 to {self._vocab_size - 1}"
        what = "the mask id" if found == self._mask_id else f"wanted {limit}"
        return DataError(
            f"{self._bin.path}: document {document} has the token id {found} at position {within} ({what}); "
            "preprocess the corpus with the tokenizer of this run"
        )

    def _token_offset(self, sequence: int) -> int:
        if sequence == self.num_sequences:
            return self.num_tokens
        return self._pointers.at(sequence) // self.dtype.itemsize

    def _all_spans(self) -> list[tuple[int, int]]:
        return [(start, min(CHUNK, self.num_tokens - start)) for start in range(0, self.num_tokens, CHUNK)]

    def _even_spans(self) -> list[tuple[int, int]]:
        """Return (offset, count) of the first tokens, the last, and 62 spans between; all of a small file."""
        if self.num_tokens <= _EVEN_SPANS * _EVEN_SPAN_TOKENS:
            return self._all_spans()
        last = self.num_tokens - _EVEN_SPAN_TOKENS
        return [(last * i // (_EVEN_SPANS - 1), _EVEN_SPAN_TOKENS) for i in range(_EVEN_SPANS)]

    def _random_spans(self) -> list[tuple[int, int]]:
        """Return (offset, count) of random spans, which find damage that is periodic and so missed by even spans."""
        if self.num_tokens <= _EVEN_SPANS * _EVEN_SPAN_TOKENS:
            return []
        starts = np.random.default_rng(0).integers(0, self.num_tokens - _RANDOM_SPAN_TOKENS, size=_RANDOM_SPANS)
        return [(int(start), _RANDOM_SPAN_TOKENS) for start in np.sort(starts)]

    def _refuse_missing(self, folder: Path | None) -> None:
        if folder is not None:
            if not idx_path(folder / TOKENS).is_file():
                wanted = f"wanted {idx_path(folder / TOKENS)}, which is written when all shards are there"
                again = "repeat the `megadiff preprocess_data --shards` command that began it"
                raise DataError(f"{folder}: the folder of shards is not finished; {wanted}; {again}")
            return
        wanted = (idx_path(self.prefix), bin_path(self.prefix))
        missing = [str(path) for path in wanted if not path.is_file()]
        if not missing:
            return
        megatron = f"{self.prefix}_text_document"
        near = megatron if idx_path(megatron).is_file() else None
        if near is None and not idx_path(self.prefix).is_file():
            near = similar_path(self.prefix, Path.is_file, ending=".idx")
        made = Path(self.prefix).with_suffix("")  # from train.jsonl
        if Path(self.prefix).is_file() and idx_path(made).is_file():
            near = str(made)
        hint = f"did you mean {near}?" if near else "run `megadiff preprocess_data` first"
        if near is None and Path(self.prefix).is_file():
            hint = f"{self.prefix} is a file; make indexed data of it with `megadiff preprocess_data`"
        named = f"wanted {wanted[0]} and {wanted[1]}"
        raise DataError(f"{self.prefix}: no indexed data; {named}, found no {' and no '.join(missing)}; {hint}")

    def _refused(self, wanted: str, found: object, remedy: str = REMEDY) -> DataError:
        return DataError(f"{self._idx.path}: wanted {wanted}, found {found}; {remedy}")

    def _refused_at(self, name: str, column: StoredIntegers, index: int, rule: str) -> DataError:
        return self._refused(f"{name}[{index}] at byte {column.byte_of(index)} {rule}", column.at(index))

    def _checked_header(self) -> tuple[np.dtype, int, int]:
        """Validate the header and return (dtype, sequences, documents).

        Nothing is allocated before the counts agree with the file's size.
        """
        size = self._idx.size
        if size < HEADER.size:
            raise self._refused(f"a header of {HEADER.size} bytes", f"{size} bytes in all")
        magic, version, code, sequences, boundaries = HEADER.unpack(self._idx.read(0, HEADER.size))
        if magic != MAGIC:
            raise self._refused(f"the magic {MAGIC!r} at byte 0", repr(magic), "give the prefix of indexed data")
        if version != VERSION:
            raise self._refused(f"version {VERSION} at byte 9", version)
        if code not in DTYPES:
            raise self._refused("an integer dtype code (1-5 or 8) at byte 17", code)
        if sequences < 1 or boundaries < 2:
            found = f"{sequences} and {boundaries}"
            raise self._refused("at least one sequence (byte 18) and two document boundaries (byte 26)", found)
        wanted = HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (wanted, wanted + sequences):  # the latter has a mode per sequence, as in multimodal files
            declared = f"{sequences} sequences (byte 18) and {boundaries - 1} documents (byte 26)"
            raise self._refused(f"{wanted} bytes for the {declared} that the header declares", size)
        return DTYPES[code], sequences, boundaries - 1

    def _open_index(self) -> None:
        lengths_at = HEADER.size
        pointers_at = lengths_at + 4 * self.num_sequences
        documents_at = pointers_at + 8 * self.num_sequences
        self._lengths = StoredIntegers(self._idx, np.dtype("<i4"), offset=lengths_at, count=self.num_sequences)
        self._pointers = StoredIntegers(self._idx, np.dtype("<i8"), offset=pointers_at, count=self.num_sequences)
        self._documents = StoredIntegers(self._idx, np.dtype("<i8"), offset=documents_at, count=self.num_documents + 1)

    def _checked_lengths(self) -> int:
        """Check every length, and every pointer against the sum of the lengths before it; return the number of tokens.

        A sequence may be empty, as in Megatron's own reader, but not in data written by this package.
        """
        tokens, least = 0, 0 if self.manifest is None or self.has_spans else 1
        for start, stored in self._lengths.chunks():
            lengths = stored.astype(np.int64)
            if (lengths < least).any():
                wrong = start + int((lengths < least).argmax())
                raise self._refused_at("length", self._lengths, wrong, f"of at least {least}")
            ends = tokens + np.cumsum(lengths)
            pointers = (ends - lengths) * self.dtype.itemsize
            if (bad := self._pointers.read(start, len(lengths)) != pointers).any():
                wrong = int(bad.argmax())
                raise self._refused_at("pointer", self._pointers, start + wrong, f"= {pointers[wrong]}")
            tokens = int(ends[-1])
            if tokens > _MOST_TOKENS:
                raise self._refused(f"at most {_MOST_TOKENS} tokens in the lengths from byte {HEADER.size} on", tokens)
        if not tokens:
            raise self._refused(f"at least one token in the lengths from byte {HEADER.size} on", tokens)
        return tokens

    def _check_documents(self) -> None:
        """Check that document boundaries rise from 0 to the number of sequences, by 1 in this package's own files.

        Where these hold conversations, they rise by 2 at least: what is given, and an answer.
        """
        ends = {0: 0, self.num_documents: self.num_sequences}
        for index, wanted in ends.items():
            if self._documents.at(index) != wanted:
                raise self._refused_at("document", self._documents, index, f"= {wanted}")
        for start, part in self._documents.chunks(overlap=1):
            if self.has_spans and (other := np.diff(part) < 2).any():
                wrong = int(other.argmax())
                raise self._refused_at("document", self._documents, start + wrong + 1, f">= {part[wrong] + 2}")
            if self.manifest is None or self.has_spans:
                pass
            elif (other := part != np.arange(start, start + len(part))).any():
                wrong = start + int(other.argmax())
                raise self._refused_at("document", self._documents, wrong, f"= {wrong}")
            if (back := part[1:] < part[:-1]).any():
                wrong = int(back.argmax())
                raise self._refused_at("document", self._documents, start + wrong + 1, f">= {part[wrong]}")

    def _check_bin_size(self) -> None:
        wanted, found = self.num_tokens * self.dtype.itemsize, self._bin.size
        if wanted != found:
            what = "cut short" if found < wanted else "of other data"
            raise DataError(f"{self._bin.path}: wanted {wanted} bytes, found {found}; the file is {what}: {REMEDY}")

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        recorded = (self.manifest.documents, self.manifest.tokens, self.manifest.dtype)
        real = (self.num_documents, self.num_tokens, self.dtype.name)
        if recorded != real:
            wanted = f"wanted the documents, tokens and dtype {real} of the .idx, found {recorded}"
            raise DataError(f"{self._manifest_path}: {wanted}; {REMEDY}")


def _joined(folder: Path) -> JoinedFile:
    return JoinedFile(folder, [bin_path(prefix) for prefix in shard_prefixes(folder)])
