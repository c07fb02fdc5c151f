"""Small indexed corpora for the tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from megadiff.data.indexed_format import tokenizer_facts
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.tokenizers.byte import ByteTokenizer


def end_process(texts: list[str]) -> None:
    """Take the place of the function that tokenizes in a worker: end the worker."""
    del texts
    os._exit(3)


def write_indexed(prefix: Path, documents: list[list[int]], vocab_size: int = 260) -> Path:
    """Documents as ids of the byte tokenizer."""
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish(tokenizer=tokenizer_facts(ByteTokenizer()), source_bytes=writer.num_tokens)
    return prefix


def random_documents(count: int, *, seed: int = 0, longest: int = 40) -> list[list[int]]:
    """Ids of ordinary bytes, 4 to 259."""
    draw = np.random.default_rng(seed)
    return [draw.integers(4, 260, size=draw.integers(1, longest + 1)).tolist() for _ in range(count)]


def counting_reader(prefix: Path, num_tokens: int) -> IndexedReader:
    """Token i of the stream is 10 + i, in documents of up to 7 tokens."""
    ids = list(range(10, 10 + num_tokens))
    write_indexed(prefix, [ids[i : i + 7] for i in range(0, num_tokens, 7)], vocab_size=10 + num_tokens)
    return IndexedReader(prefix)
