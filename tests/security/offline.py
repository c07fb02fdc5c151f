"""Import every module of the package, train as the command does, and list what Python tried to connect to.

Run as a program: `python -m tests.security.offline --config F`; what the command prints comes first, then two lines,
`connections` with a JSON list, and `unimported` with the package that each such module lacks.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import runpy
import sys
from collections.abc import Callable
from typing import Any

OPTIONAL = {"transformers", "lm_eval", "pyarrow", "transformer_engine", "apex", "triton", "wandb"}
"""Packages a module may need that are no part of a plain installation."""

LOOPBACK = ("127.", "::1", "localhost")
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "http.client.connect")


def watch_connections(note: Callable[[str], object]) -> None:
    """From now on `note` is called with everything this process tries to reach beyond its machine."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS:
            return
        target = next((part for part in arguments if isinstance(part, str | tuple)), arguments)
        host = str(target[0] if isinstance(target, tuple) else target)
        is_local_path = event in ("socket.connect", "socket.sendto") and isinstance(target, str)
        if not (is_local_path or host.startswith(LOOPBACK) or host in ("", "None")):
            note(f"{event} {target!r}")

    sys.addaudithook(hook)


def import_everything() -> dict[str, str]:
    """The modules that could not be imported for want of an optional package, and which."""
    import megadiff

    missing = {}
    for module in pkgutil.walk_packages(megadiff.__path__, "megadiff."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            if package not in OPTIONAL:
                raise
            missing[module.name] = package
    return missing


def main() -> None:
    """See the module's text."""
    seen: list[str] = []
    watch_connections(seen.append)
    missing = import_everything()
    sys.argv = ["pretrain_dlm.py", *sys.argv[1:]]
    runpy.run_path("pretrain_dlm.py", run_name="__main__")
    print("connections", json.dumps(seen))
    print("unimported", json.dumps(missing))


if __name__ == "__main__":
    main()
