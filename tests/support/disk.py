"""Every operation that changes the disk, counted: to see the state each one leaves, or to let one fail."""

from __future__ import annotations

import builtins
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

_CHANGES = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "fsync", "truncate", "ftruncate")


class _Watched:
    """A file whose writes are announced, each also when half of it is on the disk."""

    def __init__(self, file: Any, announce: Callable[[str], None]) -> None:
        self._file, self._announce = file, announce

    def write(self, data: Any) -> int:
        self._announce(f"write {self._file.name}")
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._announce(f"half of a write to {self._file.name}")
        self._file.write(data[half:])
        self._file.flush()
        return len(data)

    def __enter__(self) -> _Watched:
        self._file.__enter__()
        return self

    def __exit__(self, *failure: Any) -> Any:
        return self._file.__exit__(*failure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def watched_disk(announce: Callable[[str], None]) -> Iterator[None]:
    """Call `announce(what)` before every change this process makes to the disk, from whichever thread makes it.

    Whatever `announce` itself does to the disk is not announced. It may raise, and the change does not happen.
    """
    inside = threading.local()

    def tell(what: str) -> None:
        if getattr(inside, "is_telling", False):
            return
        inside.is_telling = True
        try:
            announce(what)
        finally:
            inside.is_telling = False

    def opened(original: Callable[..., Any]) -> Callable[..., Any]:
        def open_and_watch(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            is_plain = isinstance(path, int) or not set(mode) & set("wxa+") or getattr(inside, "is_telling", False)
            if is_plain:
                return original(path, mode, *args, **kwargs)
            tell(f"open {path}")
            return _Watched(original(path, mode, *args, **kwargs), tell)

        return open_and_watch

    def changing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            tell(f"{name} {args[0]}")
            return original(*args, **kwargs)

        return change

    patches = [patch.object(os, name, changing(name, getattr(os, name))) for name in _CHANGES]
    patches += [patch.object(module, "open", opened(module.open)) for module in (io, builtins)]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
