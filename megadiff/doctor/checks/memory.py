"""Memory per rank, by a dry run, against the memory available, and settings that would make it fit.

Settings are searched by the closed form, and those suggested are built in a dry run too. Where a dry run gives no
answer in time, and where the closed form is far beyond the memory, the closed form is the answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import product

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn
from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig
from megadiff.run.dry_runs import Fullest, Refused, dry_runs
from megadiff.run.summary import memory_per_rank

_CLOSE = 0.85
"""Fraction of the memory above which parts missing from the estimate (context, buffers, fragmentation) may not fit."""

_FAR = 2.0
"""Multiple of the memory from which a closed form within a tenth of the truth leaves nothing to build."""
_LIMIT_S = 50.0
"""Seconds for all dry runs of an examination, below the limit of a check (`megadiff.doctor.examination.LIMIT_S`)."""
_TRIED = 3
"""Number of suggestions that are built, from the one with the fewest changes on."""

_POWERS = (1, 2, 4, 8, 16)


def check(subject: Subject) -> Iterable[Finding]:
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
