"""The real commands in forked processes: the parent has imported torch already, so a start costs a tenth of a second.

What a command does from its command line to its exit code is the same as in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from megadiff.platform.quiet import quiet
from tests.support.commands import REPOSITORY

with quiet():  # what the commands import, before the fork
    import megadiff.run.build
    import megadiff.run.load_model  # noqa: F401


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def call_forked(
    *command: str | Path,
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    timeout_s: float = 600.0,
) -> Ended:
    """Run `python COMMAND...`, a script of the repository and its arguments, in a forked process.

    Args:
        env: variables to set.
        before: called in the process before the script; to take a right away, for example.

    Raises:
        AssertionError: it did not end in time.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        words = [str(word) for word in command]
        process = multiprocessing.get_context("fork").Process(target=_child, args=(words, env or {}, before, out, err))
        process.start()
        process.join(timeout_s)
        hangs = process.is_alive()
        process.kill()
        process.join()
        assert not hangs, f"{words} did not end in {timeout_s} s"
        assert process.exitcode is not None
        return Ended(process.exitcode, out.read_text(), err.read_text())


def _child(command: list[str], env: Mapping[str, str], before: Callable[[], None] | None, out: Path, err: Path) -> None:
    for number, (name, path) in enumerate((("stdout", out), ("stderr", err)), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
    warnings.resetwarnings()  # the test runner's, which make errors of them
    warnings.simplefilter("ignore")
    os.environ.update(env)
    script = REPOSITORY / command[0]
    sys.argv = [str(script), *command[1:]]
    sys.path.insert(0, str(script.parent))
    os.chdir(REPOSITORY)
    code = 1
    try:
        if before is not None:
            before()
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
