"""A disk that fills at any write of any file of the run folder, and has room again later: the same curve, no traceback.

`MEGADIFF_FULL_DISKS=40 python -m pytest tests/end_to_end/test_full_disk.py -s` does it forty times on a small file
system that is really full, and forty times with errors of other kinds.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import write_yaml
from tests.support.disk import watched_disk
from tests.support.forked_command import Ended, call_forked
from tests.support.runs import toy_tree
from tests.support.whole_runs import curve, status

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(7200)]

TIMES = int(os.environ.get("MEGADIFF_FULL_DISKS", "2"))
STEPS = 12
LASTS = (1, 3, 10, 100)
"""Changes for which the disk is full, those that it refuses counted; few of them make a save."""


def _write_description(corpus: Path, output: Path, name: str) -> Path:
    tree = toy_tree(
        corpus,
        output,
        name=name,
        model__layers=1,
        schedule={"steps": STEPS, "warmup_steps": 2},
        checkpoint={"every": 3},
        eval={"every": 4, "sequences": 2, "num_noise_levels": 2, "samples": 1, "sample_steps": 2},
        log={"every": 1, "tensorboard": True},
    )
    return write_yaml(output / f"{name}.yaml", tree)


class _Changes:
    """Counts the changes that a command makes to the run folder, and does something before the nth of them."""

    def __init__(self, folder: Path, acts: dict[int, Callable[[], None]], refuse: Callable[[int], None]) -> None:
        self._folder, self._acts, self._refuse = str(folder), acts, refuse
        self._count = 0
        self._note = Path(tempfile.mkdtemp()) / "changes"

    def __call__(self) -> None:
        """In the process of the command, before it begins; for its whole life."""
        self._written = open(self._note, "w", buffering=1)  # noqa: SIM115  before anything is watched
        self._kept = watched_disk(self._announce)
        self._kept.__enter__()

    def _announce(self, what: str) -> None:
        if self._folder not in what:
            return
        self._count += 1
        self._written.write(f"{what}\n")
        if (act := self._acts.get(self._count)) is not None:
            act()
        self._refuse(self._count)

    @property
    def seen(self) -> list[str]:
        """What the command has changed, or tried to."""
        return self._note.read_text().splitlines()


def _any_change(changes: list[str], draw: random.Random) -> int:
    """The number of a change, every file as likely as another: a shard is written in thousands of small parts."""
    files: dict[str, list[int]] = {}
    for number, what in enumerate(changes, start=1):
        files.setdefault(re.sub(r"[0-9a-f]{16}|\d+", "", what.split("/")[-1]), []).append(number)
    return draw.choice(files[draw.choice(sorted(files))])


def _accept(number: int) -> None:
    pass


@pytest.fixture(scope="module")
def whole(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[Any]], list[str]]:
    """The curve of a run with room, and its changes to the disk."""
    folder = tmp_path_factory.mktemp("room")
    changes = _Changes(folder / "whole", {}, _accept)
    ended = call_forked("pretrain_dlm.py", "--config", _write_description(toy_corpus, folder, "whole"), before=changes)
    assert ended.code == 0, ended.err
    return curve(folder / "whole"), changes.seen


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes: room for a run of this size and little more."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(place)]).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _fill(disk: Path) -> None:
    """Take all the room; through descriptors of its own, and unseen by the counting."""
    handle = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while True:
            os.write(handle, b"0" * 4096)
    except OSError:
        pass
    finally:
        os.close(handle)


def _make_room(disk: Path) -> None:
    (disk / "filler").unlink(missing_ok=True)


def _check(ended: Ended, folder: Path, *, has_room: bool) -> None:
    """No traceback, a sentence last, and a status that agrees with the exit code wherever it could be written."""
    said = ended.out + ended.err
    assert "Traceback" not in said, said
    assert "Exception" not in said, said
    if ended.code:
        assert ended.err.splitlines()[-1].startswith("error: "), said
    if has_room and (folder / "status.json").exists():
        found = status(folder)
        wanted = ("finished", 0) if ended.code == 0 else ("no_restart" if ended.code == 2 else "failed", ended.code)
        assert (found["state"], found["exit_code"]) == wanted, (found, said)


def _finish(path: Path, folder: Path, wanted: list[list[Any]]) -> None:
    """The same command again, with room."""
    ended = call_forked("pretrain_dlm.py", "--config", path)
    assert ended.code == 0, ended.err
    _check(ended, folder, has_room=True)
    assert curve(folder) == wanted
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_a_real_disk_that_fills_and_has_room_again(whole, toy_corpus: Path, disk: Path) -> None:
    wanted, changes = whole
    draw = random.Random(int(os.environ.get("MEGADIFF_SEED", "0")))
    codes = []
    for number in range(TIMES):
        name = f"run-{number}"
        path, folder = _write_description(toy_corpus, disk, name), disk / name
        first = _any_change(changes, draw)
        last = first + draw.choice(LASTS)
        counted = _Changes(folder, {first: lambda: _fill(disk), last: lambda: _make_room(disk)}, _accept)
        ended = call_forked("pretrain_dlm.py", "--config", path, before=counted)
        _check(ended, folder, has_room=True)  # the status has its room in reserve
        codes.append(ended.code)
        _make_room(disk)
        _finish(path, folder, wanted)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    print(f"\n{TIMES} of {TIMES} runs on a full disk gave the same curve; exit codes of the first attempts {codes}")


def test_a_disk_that_refuses_in_other_ways(whole, toy_corpus: Path, tmp_path: Path) -> None:
    wanted, changes = whole
    draw = random.Random(int(os.environ.get("MEGADIFF_SEED", "0")) + 1)
    codes = []
    for number in range(TIMES):
        name = f"run-{number}"
        path, folder = _write_description(toy_corpus, tmp_path, name), tmp_path / name
        kind = draw.choice([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
        first = _any_change(changes, draw)
        last = first + draw.choice(LASTS)

        def refuse(count: int, kind: int = kind, first: int = first, last: int = last) -> None:
            if first <= count < last:
                raise OSError(kind, os.strerror(kind))

        counted = _Changes(folder, {}, refuse)
        ended = call_forked("pretrain_dlm.py", "--config", path, before=counted)
        _check(ended, folder, has_room=len(counted.seen) > last + 20)
        codes.append(ended.code)
        _finish(path, folder, wanted)
    print(f"\n{TIMES} of {TIMES} runs on a failing disk gave the same curve; exit codes of the first attempts {codes}")


def test_a_full_disk_ends_the_run_with_a_sentence_and_the_right_status(whole, toy_corpus: Path, disk: Path) -> None:
    wanted, changes = whole
    path, folder = _write_description(toy_corpus, disk, "full"), disk / "full"
    counted = _Changes(folder, {len(changes) // 3: lambda: _fill(disk)}, _accept)
    ended = call_forked("pretrain_dlm.py", "--config", path, before=counted)
    assert ended.code == 1
    _check(ended, folder, has_room=True)
    assert "No space left on device" in ended.err
    reason = json.loads((folder / "status.json").read_text())["reason"]
    assert "No space left on device" in reason

    again = call_forked("pretrain_dlm.py", "--config", path)  # a start on the full disk
    assert again.code == 1
    _check(again, folder, has_room=True)
    assert len(again.err.splitlines()) == 1

    _make_room(disk)
    _finish(path, folder, wanted)


def test_output_to_a_full_disk_costs_lines_and_nothing_else(whole, toy_corpus: Path, tmp_path: Path) -> None:
    """`pretrain_dlm.py > train.log` on the same full disk."""
    path = _write_description(toy_corpus, tmp_path, "silent")

    def close_stdout() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    ended = call_forked("pretrain_dlm.py", "--config", path, before=close_stdout)
    assert ended.code == 0
    assert ended.err == ""
    assert curve(tmp_path / "silent") == whole[0]
