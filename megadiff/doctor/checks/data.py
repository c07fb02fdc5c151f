"""The corpus: opens, is of the tokenizer, and lasts for the schedule."""

from __future__ import annotations

from collections.abc import Iterable

from megadiff.doctor.finding import Finding, fail, ok, warn
from megadiff.doctor.subject import Subject
from megadiff.errors import DataError

_EPOCHS_OF_CARE = 4


def check(subject: Subject) -> Iterable[Finding]:
    """All that a start would check, and the epochs; needs the tokenizer."""
    config = subject.config
    if config is None:
        return
    from megadiff.data.open import open_data

    try:
        tokenizer = subject.tokenizer
    except DataError:
        yield fail("not looked at: they are checked against the tokenizer", "mend data.tokenizer first")
        return
    assert tokenizer is not None
    try:
        opened = open_data(
            config.data, tokenizer, seq_length=config.model.seq_length, seed=config.seed, valid_rows=config.eval.rows
        )
    except DataError as error:
        yield fail(str(error), "tools/preprocess_data.py makes data; data.train and data.valid name their prefixes")
        return
    yield ok(f"{len(config.data.train)} source(s) to train on, fingerprint {opened.fingerprint[:16]}")
    wanted, held = config.tokens_before(config.steps), opened.train_tokens
    said = f"the schedule takes {wanted:,} tokens of {held:,}: {wanted / held:.2f} epochs"
    remedy = "watch eval_elbo for overfitting; more text or a shorter schedule helps"
    yield ok(said) if wanted <= _EPOCHS_OF_CARE * held else warn(said, remedy)
    if not config.data.valid:
        yield warn("data.valid is empty: no held-out bound will be measured", "preprocess a part of the corpus for it")
