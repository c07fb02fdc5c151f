"""A worker of a sweep's local pool: one warm process that trains one run after the other.

    python -m megadiff.run.sweep_worker COMMANDS REPLIES       # two open descriptors

Every line of COMMANDS is the path of a run description; every line of REPLIES is an object: first `{"ready": true}`,
then how each run ended. The worker ends at once when COMMANDS ends, which also happens when the pool is killed, and
after a run that failed, since the parts that look after a failing run stay until its process is gone.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, BinaryIO

from megadiff.errors import MegadiffError
from megadiff.platform.quiet import quiet


def serve(commands: BinaryIO, replies: BinaryIO) -> None:
    """Train the runs that are named until one fails or no more come; called in the main thread of a process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # between runs there is nothing to save, so it ends as by TERM
    import torch

    torch.set_num_threads(1)
    with quiet():
        from megadiff.run import build  # noqa: F401  imported now, before the first run
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands, waiting), name="commands", daemon=True).start()
    _reply(replies, {"ready": True})
    while True:
        path = waiting.get().rstrip(b"\n").decode("utf-8", "surrogateescape")
        found = train(Path(path))
        _reply(replies, found)
        if found["error"] is not None:
            return


def train(description: Path) -> dict[str, Any]:
    """Train the run of a description; return `error`, a sentence or None, and the `code` that a process would end with.

    A run that was asked to stop, and has saved itself, has no error.
    """
    from megadiff.config.load import load_config
    from megadiff.run import build
    from megadiff.run.config import RunConfig

    try:
        build.run(load_config(description, [], RunConfig))
    except MegadiffError as error:
        return {"error": str(error), "code": error.exit_code}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "code": 1}
    finally:
        gc.collect()  # models and process groups are parts of cycles, and keep memory, files and sockets
    return {"error": None, "code": 0}


def _listen(commands: BinaryIO, waiting: queue.SimpleQueue[bytes]) -> None:
    while line := commands.readline():
        waiting.put(line)
    os.kill(os.getpid(), signal.SIGKILL)  # whatever the main thread does: the pool is gone, or needs no more workers


def _reply(replies: BinaryIO, content: dict[str, Any]) -> None:
    replies.write(json.dumps(content).encode() + b"\n")
    replies.flush()


def main() -> None:
    """Train on behalf of the pool that the descriptors of the command line lead to."""
    commands, replies = (int(word) for word in sys.argv[1:3])
    serve(os.fdopen(commands, "rb"), os.fdopen(replies, "wb"))
    sys.stderr.flush()
    os._exit(1)  # whatever a failed run has left behind


if __name__ == "__main__":
    main()
