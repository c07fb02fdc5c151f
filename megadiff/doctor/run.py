"""Checks of a run description on this machine: each function `check_...` is one, as in `machine`.

Settings are searched by the closed form, and those suggested are built in a dry run too. Where a dry run gives no
answer in time, and where the closed form is far beyond the memory, the closed form is the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import product

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn
from megadiff.errors import ConfigError, DataError
from megadiff.run.config import RunConfig
from megadiff.run.dry_runs import Fullest, Refused, dry_runs
from megadiff.run.summary import lay_out_run, memory_per_rank


def check_description(subject: Subject) -> Iterable[Finding]:
    """Check whether the description can be read; yield nothing if none was given."""
    if subject.problem is not None:
        yield from (fail(line, "correct the file or the override named there") for line in subject.problem.splitlines())
    elif subject.config is not None:
        config = subject.config
        yield ok(f"{config.name}: {config.steps:,} steps of {config.tokens_per_step:,} tokens into {config.folder}")


def check_data(subject: Subject) -> Iterable[Finding]:
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


def check_layout(subject: Subject) -> Iterable[Finding]:
    """Check the divisibility that a start requires, then compare the number of devices with that of ranks."""
    config, vocab_size = subject.config, subject.vocab_size
    if config is None:
        return
    if vocab_size is None:
        yield warn("not checked: the vocabulary is unknown", "fix data.tokenizer, or set data.vocab_size")
        return
    try:
        layout = lay_out_run(config, world_size=subject.ranks, vocab_size=vocab_size)
    except ConfigError as error:
        yield fail(
            f"{subject.ranks} rank(s): {error}",
            "change the layout, or give the run's number of ranks with --ranks",
        )
        return
    yield ok(
        f"{layout.world_size} rank(s): tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}, "
        f"{layout.num_microbatches} microbatch(es) a step"
    )
    here, devices, platform = subject.local_ranks, subject.platform.local_devices(), subject.platform
    if here <= devices:
        return
    if platform.is_cpu:
        yield warn(f"{here} ranks share {devices} core(s)", "fine for a trial, but the ranks take turns")
    else:
        yield fail(f"{here} ranks on this node, which has {devices} GPU(s)", f"start at most {devices} ranks a node")


_CLOSE = 0.85
"""Fraction of the memory above which parts missing from the estimate (context, buffers, fragmentation) may not fit."""

_FAR = 2.0
"""Multiple of the memory from which a closed form within a tenth of the truth leaves nothing to build."""
_LIMIT_S = 50.0
"""Seconds for all dry runs of an examination, below the limit of a check (`megadiff.doctor.examination.LIMIT_S`)."""
_TRIED = 3
"""Number of suggestions that are built, from the one with the fewest changes on."""

_POWERS = (1, 2, 4, 8, 16)


def check_memory(subject: Subject) -> Iterable[Finding]:
    """Compare what a rank needs with the memory; yields nothing if there is no valid layout, which its own check
    reports."""
    config, vocab_size = subject.config, subject.vocab_size
    if config is None or vocab_size is None:
        return
    needed = estimate(config, subject.ranks, vocab_size)
    if needed is None:
        return
    held = subject.platform.memory_bytes() // (subject.local_ranks if subject.platform.is_cpu else 1)
    whose = (
        f"rank's part of {subject.platform.device_name}" if subject.platform.is_cpu else subject.platform.device_name
    )
    deadline, source = time.monotonic() + _LIMIT_S, "closed form"
    built = None if needed > _FAR * held else _built([(config, subject.ranks)], deadline)
    if built is not None:
        (found,) = built
        if isinstance(found, Refused):
            yield fail(f"a dry run refuses the run: {found.sentence}", "change the setting that the sentence names")
            return
        needed, source = found.total_bytes, f"dry run of rank {found.rank}"
        source += f", {found.not_built} by the closed form" if found.not_built else ""
    message = f"about {needed / 2**30:.3g} GiB a rank of {held / 2**30:.3g} GiB ({whose}; {source})"
    if needed <= _CLOSE * held:
        yield ok(message)
        return
    tell = fail if needed > held else warn
    yield tell(message, _remedy(config, subject.ranks, vocab_size, held, deadline))


def _built(runs: list[tuple[RunConfig, int]], deadline: float) -> list[Fullest | Refused] | None:
    left = deadline - time.monotonic()
    return dry_runs(runs, limit_s=left) if runs and left > 0 else None


def estimate(config: RunConfig, ranks: int, vocab_size: int) -> int | None:
    """Return the bytes on the fullest rank; None if the layout is not valid."""
    try:
        layout = config.layout(world_size=ranks, vocab_size=vocab_size)
    except ConfigError:
        return None
    return memory_per_rank(config, layout, config.shape(vocab_size=vocab_size)).total


def _remedy(config: RunConfig, ranks: int, vocab_size: int, held: int, deadline: float) -> str:
    fitting = []
    for changes in _settings(config):
        needed = estimate(changed(config, changes), ranks, vocab_size)
        if needed is not None and needed <= _CLOSE * held:
            fitting.append((len(changes), needed, changes))
    if not fitting:
        return f"no layout of {ranks} rank(s) fits: take more ranks, a smaller model, or a machine with more memory"
    tried = sorted(fitting, key=lambda found: found[:2])[:_TRIED]
    _, needed, changes = tried[0]
    source = "by the closed form"
    built = _built([(changed(config, each), ranks) for _, _, each in tried], deadline)
    for (_, _, each), found in zip(tried, built or (), strict=False):
        if isinstance(found, Fullest) and found.total_bytes <= _CLOSE * held:
            changes, needed, source = each, found.total_bytes, "by a dry run"
            break
    words = " ".join(f"{key}={_word(value)}" for key, value in changes.items())
    return f"{words} would take {needed / 2**30:.3g} GiB {source}"


def _settings(config: RunConfig) -> Iterator[dict[str, int | bool]]:
    """Yield every combination of the settings that affect memory, as the keys to change."""
    now = config.parallel
    micro = [size for size in range(1, config.batch.micro_batch_size + 1) if config.batch.micro_batch_size % size == 0]
    may_cut = config.precision.master_weights  # the distributed optimizer requires master weights
    for size, tensor, pipeline, cut in product(micro, _POWERS, _POWERS, {now.distributed_optimizer, may_cut}):
        wanted: dict[str, int | bool] = {
            "batch.micro_batch_size": size,
            "parallel.tensor": tensor,
            "parallel.pipeline": pipeline,
            "parallel.distributed_optimizer": cut,
            "parallel.sequence": now.sequence and tensor > 1,
        }
        yield {key: value for key, value in wanted.items() if value != _value(config, key)}


def changed(config: RunConfig, changes: dict[str, int | bool]) -> RunConfig:
    """Return the description with some settings of its sections changed."""
    for key, value in changes.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def _value(config: RunConfig, key: str) -> int | bool:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _word(value: int | bool) -> str:
    return str(value).lower()


_SPANS, _SPAN_TOKENS = 16, 4096


def check_tokenizer(subject: Subject) -> Iterable[Finding]:
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
