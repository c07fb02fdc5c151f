"""Check of the corpus: it can be opened, was made with the run's tokenizer, suffices for the schedule, and is separate
from the validation data."""

from __future__ import annotations

from collections.abc import Iterable

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn
from megadiff.errors import DataError


def check(subject: Subject) -> Iterable[Finding]:
    """Check everything that a start would, and look for likely mistakes; needs the tokenizer."""
    config = subject.config
    if config is None:
        return
    from megadiff.data.open import open_data
    from megadiff.data.review import advice, describe_sources, describe_validation

    try:
        tokenizer = subject.tokenizer
    except DataError:
        yield fail("not checked: the data need the tokenizer, which cannot be loaded", "fix data.tokenizer first")
        return
    assert tokenizer is not None
    try:
        opened = open_data(
            config.data,
            tokenizer,
            seq_length=config.model.seq_length,
            seed=config.seed,
            valid_sequences=config.eval.sequences,
            samples_before=config.sizes.samples_before,
            samples=config.samples,
        )
    except DataError as error:
        yield fail(str(error), "`megadiff preprocess_data` makes data; data.train and data.valid name their prefixes")
        return
    yield ok(f"{len(opened.drawn_at(config.samples))} source(s) to train on, fingerprint {opened.fingerprint[:16]}")
    for line in (*describe_sources(opened, now=0, end=config.samples), *describe_validation(opened)):
        yield ok(" ".join(line.removeprefix("data ").split()))
    found = advice(
        opened, config.data, end=config.samples, length=config.length_setting, eval_sequences=config.eval.sequences
    )
    yield from (warn(doubt.text, doubt.remedy) for doubt in found)
