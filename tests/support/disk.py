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


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


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
            if not set(mode) & set("wxa+") or getattr(inside, "is_telling", False):
                return original(path, mode, *args, **kwargs)
            if not isinstance(path, int):  # a descriptor was announced when it was opened
                tell(f"open {path}")
            return _Watched(original(path, mode, *args, **kwargs), tell)

        return open_and_watch

    def changing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            tell(f"{name} {args[0]}")
            return original(*args, **kwargs)

        return change

    open_descriptor, write_descriptor = os.open, os.write

    def open_and_tell(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & _WRITING:
            tell(f"open {path}")
        return open_descriptor(path, flags, *args, **kwargs)

    def write_and_tell(handle: int, data: Any) -> int:
        name = _name_of(handle)
        if not name.startswith("/") or name.startswith("/dev/"):
            return write_descriptor(handle, data)
        tell(f"write {name}")
        return write_descriptor(handle, data)

    patches = [patch.object(os, name, changing(name, getattr(os, name))) for name in _CHANGES]
    patches += [patch.object(module, "open", opened(module.open)) for module in (io, builtins)]
    patches += [patch.object(os, "open", open_and_tell), patch.object(os, "write", write_and_tell)]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def _name_of(handle: int) -> str:
    """The path of an open file; "" for what is none."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return ""
