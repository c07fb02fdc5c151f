"""Hooks and sinks of the YAML's list: built, called when due, and named in the sentence when they fail."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megadiff.config.registry import account_of
from megadiff.errors import HookError, MegadiffError, StorageError
from megadiff.files import is_storage_failure
from megadiff.train.config import HOOKS, HookConfig
from megadiff.train.hooks import Hook, HookContext, MetricSink

log = logging.getLogger("megadiff")


def build_listed(configs: Sequence[HookConfig], context: HookContext) -> list[ListedHook]:
    """Return the hooks of the list, and open its sinks on the main rank.

    Raises:
        HookError: one of them cannot be built.
    """
    hooks: list[ListedHook] = []
    count: Counter[str] = Counter()
    for config in configs:
        count[config.name] += 1
        name = config.name if count[config.name] == 1 else f"{config.name} ({count[config.name]})"
        member = HOOKS.member(config.name)
        caller = _Caller(name, member.__file__ or "", config.every, context)
        with caller.naming("could not be built"):
            made = member.build(config, context)
        if not isinstance(made, Hook | MetricSink):
            raise HookError(
                f"hook `{name}`: build must return a megadiff.train.hooks.Hook or MetricSink, found "
                f"{type(made).__name__}"
            )
        if isinstance(made, MetricSink) and context.topology.is_main:
            context.sinks.add(ListedSink(made, caller))
        if isinstance(made, Hook):
            hooks.append(ListedHook(made, caller))
    return hooks


def states(hooks: Sequence[Hook]) -> dict[str, Any]:
    """Return what a checkpoint keeps for hooks of the list, by name."""
    found = {hook.name: hook.state() for hook in hooks if isinstance(hook, ListedHook)}
    return {name: state for name, state in found.items() if state}


def restore(hooks: Sequence[Hook], saved: Mapping[str, Any]) -> None:
    """Give hooks of the list what a checkpoint has kept for them."""
    for hook in hooks:
        if isinstance(hook, ListedHook) and hook.name in saved:
            hook.restore(saved[hook.name])


class _Caller:
    """Name and schedule of one entry of the list, and the sentence for what it raises."""

    def __init__(self, name: str, file: str, every: int, context: HookContext) -> None:
        self.name, self.file, self.every, self.context = name, file, every, context
        self._last_step = context.config.steps
        self._is_open = self._is_closed = False

    def is_due(self, step: int) -> bool:
        """Return whether the entry is called after this step."""
        return step % self.every == 0 or step == self._last_step

    @contextmanager
    def naming(self, event: str) -> Iterator[None]:
        """Turn an exception into a sentence with the entry's name and the line that raised it.

        Raises:
            HookError, or the class of the MegadiffError that was raised. Lack of memory passes through: the run has
                its own sentence for that.
        """
        try:
            yield
        except HookError:
            raise
        except MegadiffError as error:
            raise type(error)(f"hook `{self.name}` {event}: {error}") from error
        except Exception as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise
            kind = StorageError if isinstance(error, OSError) and is_storage_failure(error) else HookError
            raise kind(
                f"hook `{self.name}` {event}: {account_of(error, self.file)}; correct it or take it out of `hooks`, "
                "then run the same command again"
            ) from error

    def open(self, part: Hook | MetricSink) -> None:
        """Open the entry, once: as a sink, if it is both a hook and a sink."""
        if not self._is_open:
            self._is_open = True
            with self.naming("could not be opened"):
                part.open()

    def close(self, part: Hook | MetricSink) -> None:
        """Close the entry, once; a failure is logged, since the run is over."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            part.close()
        except Exception as error:
            log.warning(f"hook `{self.name}` could not be closed: {type(error).__name__}: {error}")


class ListedHook(Hook):
    """A hook of the list: called when due, and held to leaving the weights alone."""

    def __init__(self, hook: Hook, caller: _Caller) -> None:
        self.hook, self._caller = hook, caller
        self.name = caller.name
        self.section = hook.section  # pyright: ignore[reportAttributeAccessIssue]  that of the hook inside
        self.collectives = hook.collectives  # pyright: ignore[reportAttributeAccessIssue]

    def open(self) -> None:
        """Open the hook."""
        self._caller.open(self.hook)

    def __call__(self, info: Any) -> None:
        """Call the hook if it is due.

        Raises:
            HookError: it raised, or it changed a weight in place.
        """
        if not self._caller.is_due(info.step):
            return
        before = self._versions()
        with self._caller.naming(f"failed after step {info.step}"):
            self.hook(info)
        if self._versions() != before:
            raise HookError(
                f"hook `{self.name}` changed weights of the model after step {info.step}; hooks read a run and never "
                "change it: let it work on copies (`tensor.clone()`)"
            )

    def state(self) -> dict[str, Any]:
        """Return the hook's state.

        Raises:
            HookError: it is not a mapping that JSON can hold.
        """
        with self._caller.naming("could not give its state"):
            state = self.hook.state()
            return dict(json.loads(json.dumps(state, allow_nan=False))) if state else {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Give the hook its state."""
        with self._caller.naming("could not take its state back"):
            self.hook.restore(state)

    def close(self) -> None:
        """Close the hook."""
        self._caller.close(self.hook)

    def _versions(self) -> list[int]:
        """Return torch's counters of in-place changes of this rank's parameters."""
        return [parameter._version for chunk in self._caller.context.chunks for parameter in chunk.parameters()]


class ListedSink(MetricSink):
    """A sink of the list: given a copy of each line that is due."""

    def __init__(self, sink: MetricSink, caller: _Caller) -> None:
        self.sink, self._caller = sink, caller

    def open(self) -> None:
        """Open the sink."""
        self._caller.open(self.sink)

    def write(self, line: dict[str, Any], step: int) -> None:
        """Give the sink a line if it is due."""
        if self._caller.is_due(step):
            with self._caller.naming(f"could not write its line of step {step}"):
                self.sink.write(copy.deepcopy(line), step)

    def sync(self) -> None:
        """Make the sink's lines durable."""
        with self._caller.naming("could not be synced"):
            self.sink.sync()

    def close(self) -> None:
        """Close the sink."""
        self._caller.close(self.sink)
