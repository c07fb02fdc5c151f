"""The local pool of a sweep: warm worker processes that take one run after the other. No torch in the pool's process.

A worker that is killed, or whose run fails, is replaced, and the other runs go on. Killed itself, the pool takes its
workers with it, and the next one goes on from the runs' checkpoints: what is trained depends on neither. The folder's
lock is held by the workers too, so a second pool cannot begin while a worker of the first one is left.

This module is both sides. A worker is a process of this file:

    python -m megadiff.run.sweep_pool COMMANDS REPLIES       # two open descriptors

Every line of COMMANDS is the path of a run description; every line of REPLIES is an object: first `{"ready": true}`,
then how each run ended. The worker ends at once when COMMANDS ends, which also happens when the pool is killed, and
after a run that failed, since the parts that look after a failing run stay until its process is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megadiff.errors import ConfigError, MegadiffError, StorageError
from megadiff.platform.quiet import quiet
from megadiff.run.sweep_folder import RunState, read_manifest, state_of
from megadiff.supervision.launch import Holder
from megadiff.supervision.status import FAILED, RUNNING, read_status, write_status

WORKER_LOG = "workers.log"
"""File in the sweep's folder with what the workers printed to stderr."""
_LOCK = ".pool.lock"
_LEAVING_S, _LOOK_EVERY_S = 15.0, 0.2
_SAME_MISTAKES = 3
_TRIES = 3
"""Number of workers that may end before they begin a run until it counts as failed."""
_MOST_RUNS = 50
"""Number of runs after which a worker is replaced: libraries keep a few descriptors open for every process group."""
_ROOT = Path(__file__).resolve().parents[2]
_OF_RANKS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)


class PoolError(MegadiffError):
    """A sweep with runs that failed, or workers that do not start. Exit code 1."""

    exit_code = 1


class Process(Protocol):
    """A worker's process, as `subprocess.Popen` has it."""

    def wait(self) -> int:
        """Return the exit code, negative for a signal, once the process has ended."""
        ...

    def send_signal(self, sig: int, /) -> None:
        """Send a signal to the process, if it still runs."""
        ...


Starter = Callable[[int, int, int, int], Process]
"""Function of a worker's number, the descriptors of its commands and replies, and the one that holds the lock; returns
its process, which has inherited them."""


@dataclass
class _Worker:
    number: int
    process: Process
    commands: int
    replies: int
    run: dict[str, Any] | None = None
    """Entry of the run that it trains."""
    begun: float = 0.0
    is_ready: bool = False
    ended: int = 0
    """Number of runs that it has trained."""
    buffer: bytes = b""


def start_worker(number: int, commands: int, replies: int, lock: int, *, log: Path) -> Process:
    """Start a worker with one thread, in a session of its own: a terminal's Ctrl-C reaches the pool alone."""
    environment = {key: value for key, value in os.environ.items() if key not in _OF_RANKS}
    path = os.pathsep.join([str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}
    if devices := _devices(environment):
        environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
    with log.open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "megadiff.run.sweep_pool", str(commands), str(replies)],
            pass_fds=(commands, replies, lock),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            env=environment,
        )


def _devices(environment: dict[str, str]) -> list[str]:
    """Return the GPUs among which workers are spread; none on a machine without any."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device for device in visible.split(",") if device]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lock a sweep's folder for one pool and its workers; yield the descriptor that holds the lock.

    Raises:
        ConfigError: another pool trains there.
        StorageError: the disk refuses.
    """
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"{folder / _LOCK} cannot be opened ({error.strerror or error})") from None
    until = time.monotonic() + _LEAVING_S
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = Holder.read(folder)
                if (holder is None or holder.is_leaving) and time.monotonic() < until:
                    time.sleep(_LOOK_EVERY_S)  # the workers of a pool that was killed are about to end
                    continue
                who = "another pool" if holder is None else f"another pool ({holder.describe()})"
            raise ConfigError(f"{who} trains in {folder}; wait for its end, or stop it")
        Holder.this_process().write(folder)
        yield lock
        Holder.remove(folder)
    finally:
        os.close(lock)


class Pool:
    """The workers and the runs that wait for one."""

    def __init__(self, folder: Path, jobs: int, say: Callable[[str], None], start: Starter) -> None:
        """Store the settings; nothing is started yet.

        Args:
            folder: the sweep's folder.
            jobs: number of workers.
            say: function that shows a line to the user.
            start: function that starts a worker.
        """
        self.folder, self.jobs, self.say, self.start = folder, jobs, say, start
        self.failures: dict[str, str] = {}
        """Sentences about runs that failed, by name."""
        self.signals: list[int] = []
        """Signals by which the pool was asked to stop."""
        self._is_closing = False
        self._entries: list[dict[str, Any]] = read_manifest(folder)["runs"]
        self._states: dict[str, RunState] = {}
        self._waiting: list[dict[str, Any]] = []
        self._workers: dict[int, _Worker] = {}
        self._mistakes: list[str] = []
        self._tries: Counter[str] = Counter()
        self._has_been_ready = self._has_announced = False
        self._broken: PoolError | None = None
        self._total = self._ended = 0
        self._lock = -1

    def train(self) -> list[RunState]:
        """Train every run that is neither finished nor diverged; return the states of all.

        The first TERM or INT makes the runs save themselves and the pool return; the next one kills the workers.

        Raises:
            ConfigError: another pool trains in the folder.
            PoolError: a worker ends before any has begun a run.
        """
        with locked(self.folder) as self._lock, self._listening():
            self._states = {entry["name"]: state_of(self.folder, entry) for entry in self._entries}
            left = [each for each in self._entries if self._states[each["name"]].state not in ("finished", "diverged")]
            self._waiting, self._total = sorted(left, key=_cost, reverse=True), len(left)
            try:
                with selectors.DefaultSelector() as selector:
                    self._loop(selector)
            finally:
                self._close()
        return [state_of(self.folder, entry) for entry in self._entries]

    def _loop(self, selector: selectors.BaseSelector) -> None:
        while True:
            self._hand_out(selector)
            self._announce()
            if not any(worker.run is not None for worker in self._workers.values()):
                break
            while not (ready := selector.select(timeout=_LOOK_EVERY_S)):
                self._announce()
            self._announce()
            for key, _ in ready:
                worker = self._workers[key.fd]
                data = os.read(key.fd, 2**16)
                worker.buffer += data
                leaves = False
                while b"\n" in worker.buffer:
                    line, worker.buffer = worker.buffer.split(b"\n", 1)
                    leaves = self._hear(worker, json.loads(line)) or leaves
                if leaves or not data:
                    selector.unregister(key.fd)
                    self._lose(worker)
        if self._broken is not None:
            raise self._broken

    def _announce(self) -> None:
        """Show once that a signal came."""
        if self.signals and not self._has_announced:
            self._has_announced = True
            self.say(f"{signal.Signals(self.signals[0]).name}: the runs save themselves; again to leave at once")

    def _hand_out(self, selector: selectors.BaseSelector) -> None:
        """Give every worker that has none a run, and start workers as long as runs are left."""
        if self._is_closing:
            return
        self._drop_orphans()
        idle = [worker for worker in self._workers.values() if worker.run is None]
        while (entry := next((each for each in self._waiting if self._may_begin(each)), None)) is not None:
            if not idle and len(self._workers) >= self.jobs:
                return
            worker = idle.pop() if idle else self._begin(selector)
            if self._is_closing:  # a signal has come since
                return
            self._waiting.remove(entry)
            worker.run, worker.begun = entry, time.monotonic()
            path = self.folder / "descriptions" / f"{entry['name']}.yaml"
            with contextlib.suppress(BrokenPipeError):  # the worker has died, which its replies tell
                os.write(worker.commands, os.fsencode(path) + b"\n")

    def _may_begin(self, entry: dict[str, Any]) -> bool:
        return entry["trunk"] is None or self._states[entry["trunk"]].state == "finished"

    def _drop_orphans(self) -> None:
        """Give up the branches of trunks that failed, and leave out those of trunks that diverged, now or earlier."""
        busy = {worker.run["name"] for worker in self._workers.values() if worker.run is not None}
        alive = busy | {entry["name"] for entry in self._waiting}
        diverged = {name for name, state in self._states.items() if state.state == "diverged"}
        kept = [entry for entry in self._waiting if entry["trunk"] not in diverged]
        if left_out := len(self._waiting) - len(kept):
            self._waiting, self._total = kept, self._total - left_out
            which = "branch of a diverged trunk is" if left_out == 1 else "branches of diverged trunks are"
            self.say(f"{left_out} {which} left out")
        for entry in list(self._waiting):
            if not self._may_begin(entry) and entry["trunk"] not in alive:
                self._waiting.remove(entry)
                self._end(entry, f"its trunk {entry['trunk']} is not finished", 0.0)

    def _begin(self, selector: selectors.BaseSelector) -> _Worker:
        number = next(n for n in range(self.jobs) if n not in {worker.number for worker in self._workers.values()})
        to_worker, from_worker = os.pipe(), os.pipe()
        process = self.start(number, to_worker[0], from_worker[1], self._lock)
        os.close(to_worker[0])
        os.close(from_worker[1])
        worker = _Worker(number, process, commands=to_worker[1], replies=from_worker[0])
        self._workers[worker.replies] = worker
        selector.register(worker.replies, selectors.EVENT_READ)
        if self.signals:  # while it was being started
            process.send_signal(self.signals[0] if len(self.signals) == 1 else signal.SIGKILL)
        return worker

    def _hear(self, worker: _Worker, reply: dict[str, Any]) -> bool:
        """Take a worker's reply; return whether it leaves: after a run that failed, and after many."""
        if "ready" in reply:
            self._has_been_ready = worker.is_ready = True
            worker.begun = time.monotonic()
            return False
        entry, worker.run = worker.run, None
        assert entry is not None
        if reply["error"] is not None and reply["code"] == ConfigError.exit_code:
            self._count_mistake(reply["error"])
        self._end(entry, reply["error"], time.monotonic() - worker.begun)
        worker.ended += 1
        return reply["error"] is not None or worker.ended >= _MOST_RUNS

    def _count_mistake(self, sentence: str) -> None:
        """Begin no more runs once several have ended with the same mistake."""
        self._mistakes.append(sentence)
        if self._mistakes.count(sentence) >= _SAME_MISTAKES and not self._is_closing:
            self.say(f"{_SAME_MISTAKES} runs end with the same mistake, so no more are started")
            self._is_closing = True

    def _lose(self, worker: _Worker) -> None:
        """Forget a worker that has ended, with the run it may have had."""
        del self._workers[worker.replies]
        os.close(worker.replies)
        os.close(worker.commands)
        code = worker.process.wait()
        if worker.run is None or self.signals or self._broken is not None:
            return  # one that was asked to stop while it was setting up loses nothing
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if not worker.is_ready:
            self._lose_unready(worker.run, how)
            return
        run = self.folder / "runs" / worker.run["name"]
        status = read_status(run)
        if status is not None and status.state == RUNNING:
            with contextlib.suppress(OSError):
                write_status(run, status.changed(FAILED, reason=f"the worker was {how}", exit_code=1))
        self._end(worker.run, f"its worker ended ({how})", time.monotonic() - worker.begun)

    def _lose_unready(self, entry: dict[str, Any], how: str) -> None:
        """Keep the run of a worker that has ended before it could begin for another one, a few times.

        Without any worker that has begun, none is likely to: then the pool ends, and those that run save themselves.
        """
        log = self.folder / WORKER_LOG
        if not self._has_been_ready:
            self._broken = PoolError(f"a worker ended before its first run ({how}); {log} has its last words")
            self._is_closing = True
            self._send(signal.SIGTERM)
            return
        name = entry["name"]
        self._tries[name] += 1
        if self._tries[name] < _TRIES:
            self.say(f"a worker ended before its first run ({how}); {name} waits for another one")
            self._waiting = sorted([*self._waiting, entry], key=_cost, reverse=True)
            return
        reason = f"{_TRIES} workers ended before they began it ({how}); {log} has their last words"
        self._count_mistake(reason)
        self._end(entry, reason, 0.0)

    def _end(self, entry: dict[str, Any], error: str | None, seconds: float) -> None:
        """Record and show how a run ended."""
        name = entry["name"]
        state = self._states[name] = state_of(self.folder, entry)
        self._ended += 1
        place = f"[{self._ended}/{self._total}] {name}"
        if error is not None:
            self.failures[name] = error.splitlines()[0]
            self.say(f"{place} {'diverged' if state.state == 'diverged' else 'failed'}: {self.failures[name]}")
        else:
            loss = "" if state.loss is None else f", {state.loss:.4f} nats per token"
            self.say(f"{place} {state.state} after step {state.step} of {state.steps}{loss}, {seconds:.1f} s")

    @contextmanager
    def _listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        del frame
        sent = signal.SIGKILL if self.signals else number
        self.signals.append(number)
        self._is_closing = True
        self._send(sent)

    def _send(self, number: int) -> None:
        """Send a signal to every worker."""
        for worker in list(self._workers.values()):
            worker.process.send_signal(number)

    def _close(self) -> None:
        """End the workers: one whose commands end leaves at once."""
        for worker in self._workers.values():
            os.close(worker.commands)
            os.close(worker.replies)
        for worker in self._workers.values():
            worker.process.wait()
        self._workers.clear()


def _cost(entry: dict[str, Any]) -> float:
    """Return the FLOPs of a run: the longest begin first, so that no worker is left alone with one at the end."""
    return (entry["steps"] - entry["first_step"]) * entry["batch_tokens"] * entry["full_flops_per_token"]


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


def _main() -> None:
    """Train on behalf of the pool that the descriptors of the command line lead to."""
    commands, replies = (int(word) for word in sys.argv[1:3])
    serve(os.fdopen(commands, "rb"), os.fdopen(replies, "wb"))
    sys.stderr.flush()
    os._exit(1)  # whatever a failed run has left behind


if __name__ == "__main__":
    _main()
