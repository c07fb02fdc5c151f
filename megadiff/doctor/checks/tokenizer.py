"""Check of the tokenizer: it can be loaded and fits the ids in the data."""

from __future__ import annotations

from collections.abc import Iterable

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn
from megadiff.errors import DataError

_SPANS, _SPAN_TOKENS = 16, 4096


def check(subject: Subject) -> Iterable[Finding]:
    """Load the tokenizer and look for the largest id in spans spread over each source."""
    config = subject.config
    if config is None:
        return
    try:
        tokenizer = subject.tokenizer
    except DataError as error:
        yield fail(str(error), "set data.tokenizer to what `megadiff train_tokenizer` wrote, or to `byte`")
        return
    assert tokenizer is not None
    size = tokenizer.vocab_size
    yield ok(f"{tokenizer.name}: {size:,} ids, mask id {tokenizer.mask_id}")
    if config.data.vocab_size not in (None, size):
        yield fail(
            f"data.vocab_size is {config.data.vocab_size}, but the tokenizer has {size} ids", f"set it to {size}"
        )
    for source in (*config.data.training_sources.values(), *config.data.valid):
        try:
            largest = largest_sampled_id(source.path)
        except DataError:
            continue  # reported by the check of the data
        message = f"{source.path}: the largest sampled id is {largest:,} of {size:,}"
        if largest >= size:
            yield fail(message, "the data were made with another tokenizer: preprocess the corpus with this one")
        elif largest < size // 8:
            yield warn(message, "most ids never occur: check that the corpus was preprocessed with this tokenizer")
        else:
            yield ok(message)


def largest_sampled_id(prefix: str) -> int:
    """Return the largest token id in 16 spans spread over a source.

    Raises:
        DataError: the data cannot be opened.
    """
    from megadiff.data.indexed_reader import IndexedReader

    reader = IndexedReader(prefix)
    span = min(_SPAN_TOKENS, reader.num_tokens)
    last = reader.num_tokens - span
    starts = {last * i // (_SPANS - 1) for i in range(_SPANS)}
    return max(int(reader.tokens(start, span).max()) for start in starts)
