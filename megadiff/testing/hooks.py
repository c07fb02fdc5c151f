"""Contract tests of hooks and metric sinks.

    from megadiff.testing import check_hook, check_sink

    check_hook({"name": "my_package.my_hook", "every": 2, "own_setting": 3})
    check_sink("my_package.my_sink")

Each check trains a toy model for real, on one rank and on two forked ranks in several layouts: without the hook, with
it, and with it from a checkpoint, as after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from megadiff.checkpoint.manifest import read_manifest
from megadiff.run.config import RunConfig
from megadiff.testing.ranks import on_ranks
from megadiff.testing.toy_run import (
    LAYOUTS,
    SAVED,
    STEPS,
    copy_as_killed,
    figures,
    toy_config,
    wire_on_rank,
    write_corpus,
)
from megadiff.train.hooks import Hook, ListedHook, ListedSink

_COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter",
    "reduce_scatter_tensor", "scatter", "scatter_object_list",
)  # fmt: skip


@dataclass
class _Seen:
    """Observations of one run on one rank."""

    hooks: int = 0
    """Number of hooks of the list."""
    sinks: int = 0
    """Number of open sinks of the list."""
    lines: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(step, line) as the sinks of the list got them."""


def check_hook(entry: str | Mapping[str, Any], *, layouts: Mapping[str, tuple[int, dict[str, Any]]] = LAYOUTS) -> None:
    """Check that a hook keeps the family's promises.

    It must run on every layout, leave all training and evaluation figures equal to the bit, run collectives only if it
    declares them, and end with the state of the uninterrupted run when it goes on from a checkpoint.

    Args:
        entry: the entry of the list `hooks`, or its `name`.
        layouts: number of ranks and settings of the toy run, by name.

    Raises:
        AssertionError: a promise is broken, or a rank raised; the message names the layout.
        ValidationError: the entry is not valid.
    """
    for name, ranks in _check(entry, layouts):
        assert all(seen.hooks for seen in ranks), f"{name}: build returned no Hook"


def check_sink(entry: str | Mapping[str, Any], *, layouts: Mapping[str, tuple[int, dict[str, Any]]] = LAYOUTS) -> None:
    """Check that a metric sink keeps the family's promises.

    It must be opened on the main rank alone, leave all figures and the lines of the other sinks equal to the bit, get
    every line once, and go on from a checkpoint.

    Args:
        entry: the entry of the list `hooks`, or its `name`.
        layouts: number of ranks and settings of the toy run, by name.

    Raises:
        AssertionError: a promise is broken, or a rank raised; the message names the layout.
        ValidationError: the entry is not valid.
    """
    for name, ranks in _check(entry, layouts):
        assert [seen.sinks for seen in ranks] == [1] + [0] * (len(ranks) - 1), f"{name}: build returned no MetricSink"
        steps = [(step, "loss" in line) for step, line in ranks[0].lines]
        assert len(steps) == len(set(steps)), f"{name}: a line came twice"
        assert steps, f"{name}: no line came"


def _check(
    entry: str | Mapping[str, Any], layouts: Mapping[str, tuple[int, dict[str, Any]]]
) -> Iterator[tuple[str, list[_Seen]]]:
    """Yield (layout, observations by rank of the run with the entry) after the checks that hooks and sinks share."""
    listed = [{"name": entry} if isinstance(entry, str) else dict(entry)]
    with TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder, "corpus"))
        for name, (world_size, settings) in layouts.items():
            root = Path(folder, name.replace(" ", "_"))
            plain, whole = (_config(corpus, root, which, hooks, settings) for which, hooks in
                            (("plain", []), ("whole", listed)))  # fmt: skip
            resumed = _config(corpus, root, "resumed", listed, settings)
            try:
                seen = on_ranks(world_size, _train_all, plain, whole, resumed)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
            wanted = figures(plain)
            assert figures(whole) == wanted, f"{name}: the figures of the run differ with the hook"
            assert figures(resumed) == wanted, f"{name}: the figures of the resumed run differ with the hook"
            states = [_last_state(config) for config in (whole, resumed)]
            assert states[0] == states[1], f"{name}: the state after a resume is {states[1]}, without one {states[0]}"
            yield name, seen


def _config(corpus: Path, root: Path, name: str, hooks: list[Any], settings: Mapping[str, Any]) -> RunConfig:
    shared = {
        "model__layers": 2,
        "schedule__steps": STEPS,
        "checkpoint__every": SAVED,
        "eval__every": SAVED,
        "eval__sequences": 4,
    }
    return toy_config(corpus, root, **{**shared, **settings, "name": name, "hooks": hooks})


def _train_all(plain: RunConfig, whole: RunConfig, resumed: RunConfig) -> _Seen:
    """Train on this rank without the hook, with it, and with it from the middle."""
    _train(plain)
    seen = _train(whole)
    dist.barrier()
    if dist.get_rank() == 0:
        copy_as_killed(whole.folder, resumed.folder)
    dist.barrier()
    _train(resumed)
    return seen


def _train(config: RunConfig) -> _Seen:
    trainer = wire_on_rank(config, dist.get_world_size())
    listed = [hook for hook in trainer.hooks if isinstance(hook, ListedHook)]
    seen = _Seen(hooks=len(listed))
    for hook in listed:
        if not hook.collectives:
            _refuse_collectives(hook.hook)
    if not config.hooks:
        trainer.hooks = [hook for hook in trainer.hooks if hook is not trainer.checkpoint]  # its saves cost most
    with _recorded(seen):
        trainer.train()
    return seen


@contextmanager
def _recorded(seen: _Seen) -> Iterator[None]:
    """Record the lines that sinks of the list get, and count those sinks."""
    write = ListedSink.write
    sinks: set[int] = set()

    def recording(self: ListedSink, line: dict[str, Any], step: int) -> None:
        sinks.add(id(self))
        seen.lines.append((step, dict(line)))
        write(self, line, step)

    with patch.object(ListedSink, "write", recording):
        yield
    seen.sinks = len(sinks)


def _refuse_collectives(hook: Hook) -> None:
    """Make every collective of torch raise while this hook, which declares none, is called."""
    original = type(hook).__call__

    def call(self: Hook, info: Any) -> None:
        def refuse(name: str) -> Any:
            def raising(*_: Any, **__: Any) -> None:
                raise AssertionError(f"it calls torch.distributed.{name}; declare `collectives = True` in its class")

            return raising

        with patch.multiple(dist, **{name: refuse(name) for name in _COLLECTIVES}):
            original(self, info)

    hook.__class__ = type(type(hook).__name__, (type(hook),), {"__call__": call})


def _last_state(config: RunConfig) -> dict[str, Any]:
    """Return the state of the list's hooks in the last checkpoint of a run."""
    return read_manifest(config.folder / f"checkpoints/step_{STEPS:08d}").hooks
