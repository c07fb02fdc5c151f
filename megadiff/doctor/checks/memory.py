"""Closed-form estimate of the memory per rank against the memory available, and settings that would make it fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn
from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig
from megadiff.run.summary import memory_per_rank

_CLOSE = 0.85
"""Fraction of the memory above which parts missing from the estimate (context, buffers, fragmentation) may not fit."""

_POWERS = (1, 2, 4, 8, 16)


def check(subject: Subject) -> Iterable[Finding]:
    """Compare the estimate with the memory; yields nothing if there is no valid layout, which its own check reports."""
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
    message = f"about {needed / 2**30:.3g} GiB a rank of {held / 2**30:.3g} GiB ({whose})"
    if needed <= _CLOSE * held:
        yield ok(message)
        return
    tell = fail if needed > held else warn
    yield tell(message, _remedy(config, subject.ranks, vocab_size, held))


def estimate(config: RunConfig, ranks: int, vocab_size: int) -> int | None:
    """Return the bytes on the fullest rank; None if the layout is not valid."""
    try:
        layout = config.layout(world_size=ranks, vocab_size=vocab_size)
    except ConfigError:
        return None
    return memory_per_rank(config, layout, config.shape(vocab_size=vocab_size)).total


def _remedy(config: RunConfig, ranks: int, vocab_size: int, held: int) -> str:
    fitting = []
    for changes in _settings(config):
        needed = estimate(changed(config, changes), ranks, vocab_size)
        if needed is not None and needed <= _CLOSE * held:
            fitting.append((len(changes), needed, changes))
    if not fitting:
        return f"no layout of {ranks} rank(s) fits: take more ranks, a smaller model, or a machine with more memory"
    _, needed, changes = min(fitting, key=lambda found: found[:2])
    return f"{' '.join(f'{key}={_word(value)}' for key, value in changes.items())} would take {needed / 2**30:.3g} GiB"


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
