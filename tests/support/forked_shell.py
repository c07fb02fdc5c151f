"""A shell whose programs fork a process that has imported torch already: `python`, `torchrun` and `megadiff`.

Everything else is bash's: loops, globs, quoting, exit codes. A command is the real program from its command line to its
exit code; `torchrun --nproc-per-node N` becomes N forked ranks with the variables that torchrun sets.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import tests.support.forked_command  # noqa: F401  imports what the commands need, before the fork

_SHIM = """#!{python} -IS
import json, os, socket, sys
program, words = os.path.basename(sys.argv[0]), sys.argv[1:]
if program.startswith("python") and (not words or words[0].startswith("-")):
    os.execv({python!r}, [{python!r}, *words])  # -c, -m and the like: a process of its own
request = json.dumps({{"program": program, "words": words, "env": dict(os.environ)}}).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    folder = os.open(".", os.O_RDONLY)
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2, folder])
    server.sendall(request)
    code = server.recv(1)
sys.exit(code[0] if code else 1)
"""
CUTS = "MEGADIFF_TEST_CUTS"
"""Variable with the arguments that are appended, as JSON: by name of the script, or of the command of `megadiff`."""


class ForkedShell:
    """A shell to be opened with `with`.

    Args:
        folder: an empty folder for the shims and the socket; its path must be short (a socket's limit).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> ForkedShell:
        address = str(self._folder / "s")
        shim = _SHIM.format(python=sys.executable, address=address)
        for name in ("python", "python3", "torchrun", "megadiff"):
            path = self._folder / name
            path.write_text(shim)
            path.chmod(0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(64)
        self._server = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,))
        self._server.start()
        listener.close()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.terminate()
        self._server.join()

    def run(
        self, text: str, *, cwd: Path, cuts: Mapping[str, Sequence[str]] | None = None, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run shell text; the first command that fails ends it. Standard output and error come back as one text."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        env |= {
            "PATH": f"{self._folder}:{env['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
            CUTS: json.dumps({script: list(arguments) for script, arguments in (cuts or {}).items()}),
        }
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=cwd,
            env=env,
            check=False,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )


def _serve(listener: socket.socket) -> None:
    """Fork a child for every connection until this process is terminated."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Do what one call of a shim wants, send the exit code, and leave."""
    code = 1
    try:
        head, descriptors, _, _ = socket.recv_fds(connection, 4, 4)
        request = b""
        while len(request) < int.from_bytes(head, "big"):
            request += connection.recv(1 << 16)
        wanted: dict[str, Any] = json.loads(request)
        for number, descriptor in enumerate(descriptors[:3]):
            os.dup2(descriptor, number)
        os.fchdir(descriptors[3])
        os.environ.clear()
        os.environ.update(wanted["env"])
        run = {"torchrun": _torchrun, "megadiff": _run_megadiff}.get(wanted["program"], _run_script)
        code = run(wanted["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        connection.sendall(bytes([code & 255]))
        os._exit(code)


def _run_script(words: Sequence[str]) -> int:
    """Run `python WORDS` in this process and return its exit code."""
    script = Path(words[0])
    path = [str(script.resolve().parent), *_python_path()]
    return _ended(lambda: runpy.run_path(str(script), run_name="__main__"), words, script.name, path)


def _run_megadiff(words: Sequence[str]) -> int:
    """Run `megadiff WORDS` in this process, by its console script's function, and return its exit code."""
    from megadiff.__main__ import main

    return _ended(main, ["megadiff", *words], words[0] if words else "", _python_path())


def _ended(run: Callable[[], object], words: Sequence[str], name: str, path: Sequence[str]) -> int:
    """Run a program that reads `words`, and the arguments that belong to its name, and return its exit code.

    Args:
        run: the program.
        words: its command line.
        name: name to which `CUTS` may add arguments.
        path: folders where modules are looked for first.
    """
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  pytest has put its own in place
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    cuts = json.loads(os.environ.get(CUTS, "{}"))
    sys.argv = [*words, *cuts.get(name, [])]
    sys.path[:0] = path
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _python_path() -> list[str]:
    return [os.path.abspath(each) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]


def _torchrun(words: Sequence[str]) -> int:
    """Fork the ranks of a launch on one machine; like torchrun, return 1 if any of them failed."""
    options = list(words)
    ranks = 1
    while options[0].startswith("-"):
        option = options.pop(0)
        if option == "--nproc-per-node":
            ranks = int(options.pop(0))
        elif option != "--standalone":
            raise ValueError(f"this stand-in for torchrun does not know {option}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            os._exit(_run_script(options))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return int(any(codes))
