"""Spoilt Hugging Face folders through the real command: one sentence each, soon, and never other weights unnoticed.

`MEGADIFF_HOSTILE_FOLDERS=0:300` runs these folders spoilt at random, and those spoilt by hand through the command.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import time
from contextlib import contextmanager

import pytest

from megadiff.checkpoint.manifest import read_manifest
from megadiff.errors import MegadiffError
from megadiff.export.export import export
from megadiff.export.folder_files import CHECKSUMS
from megadiff.export.importing import import_folder
from tests.export import hostile_folders
from tests.export.hostile_folders import BY_HAND, as_another_program_writes, copy_of, relist
from tests.support.forked_command import call_forked

ASKED = os.environ.get("MEGADIFF_HOSTILE_FOLDERS", "")
NUMBERS = range(*map(int, (ASKED or "0:8").split(":")))
LIMIT_S = 10.0
LONGEST_MESSAGE = 5000


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    return export(checkpoints["tp1"], tmp_path_factory.mktemp("hf") / "toy").folder


@pytest.fixture(scope="module")
def foreign(folder, tmp_path_factory):
    """The same model as another program would write it: no checksums, no description of the run, two weight files."""
    copy = copy_of(folder, tmp_path_factory.mktemp("hf") / "foreign")
    as_another_program_writes(copy)
    return copy


@contextmanager
def within(seconds):
    """A limit that also ends a call which blocks."""

    def end(*_):
        raise TimeoutError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def content_of(checkpoint):
    """All that makes a checkpoint what it is."""
    manifest = read_manifest(checkpoint)
    shards = {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(".distcp")}
    config = {**manifest.config, "data": None}
    return json.dumps([shards, config, manifest.vocab_size, manifest.mask_id, manifest.tokenizer_fingerprint])


def ended(source, output, *, limit_s=LIMIT_S):
    """How the real command ends with a folder: `accepted`, or the sentence; anything else fails."""
    before = time.monotonic()
    found = call_forked(
        "tools/convert_checkpoint.py", "import", "--input", source, "--output", output, timeout_s=limit_s
    )
    assert time.monotonic() - before < limit_s
    assert "Traceback" not in found.err, found.err
    assert "panicked" not in found.err, found.err
    if found.code == 0:
        return "accepted"
    lines = [line for line in found.err.splitlines() if line]
    assert found.code == 2, found.err
    assert len(lines) == 1, found.err
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < LONGEST_MESSAGE
    assert not output.exists()
    return lines[0]


def _modes(name):
    """What is done with the checksums: nothing where they are what is spoilt; no list can hold a FIFO."""
    if "sums" in name:
        return ["kept"]
    is_listed = not any(word in name for word in ("64 GB", "FIFO", "device", "socket"))
    return ["kept", "removed", *["written again"] * is_listed]


@pytest.mark.parametrize(("name", "sums"), [(name, mode) for name in BY_HAND for mode in _modes(name)])
def test_what_is_spoilt_by_hand_is_refused(folder, tmp_path, name, sums):
    """In this process: an error of any other kind, or a wait of more than the limit, fails."""
    spoilt = copy_of(folder, tmp_path / "spoilt")
    BY_HAND[name](spoilt)
    if sums == "removed":
        (spoilt / CHECKSUMS).unlink()
    if sums == "written again":
        relist(spoilt)
    with within(LIMIT_S), pytest.raises(MegadiffError) as caught:
        import_folder(spoilt, tmp_path / "out")
    assert len(str(caught.value)) < LONGEST_MESSAGE
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_what_is_spoilt_at_random_is_refused_or_changes_nothing(folder, foreign, tmp_path):
    """With checksums as they were, what is accepted is what was exported; without, or with new ones, no traceback."""
    assert ended(folder, tmp_path / "whole") == "accepted"
    wanted = content_of(tmp_path / "whole")
    count = collections.Counter()
    for number in NUMBERS:
        draw = random.Random(number)
        mode = ("kept", "removed", "written again", "another program's")[number % 4]
        spoilt = copy_of(foreign if mode.startswith("another") else folder, tmp_path / "spoilt")
        what = hostile_folders.at_random(spoilt, draw)
        if mode == "removed":
            (spoilt / CHECKSUMS).unlink(missing_ok=True)
        if mode == "written again":
            _relisted(spoilt)
        out = tmp_path / f"out{number}"
        try:
            end = ended(spoilt, out)
        except AssertionError as error:
            raise AssertionError(f"folder {number}, sums {mode}: {what}") from error
        count[mode, "accepted" if end == "accepted" else "refused"] += 1
        if end == "accepted" and mode == "kept":
            assert content_of(out) == wanted, what
    print(dict(count))


def _relisted(folder):
    if not any(path.is_symlink() or not (path.is_file() or path.is_dir()) for path in folder.iterdir()):
        relist(folder)


@pytest.mark.skipif(not ASKED, reason="set MEGADIFF_HOSTILE_FOLDERS to run these through the command")
def test_what_is_spoilt_by_hand_is_refused_by_the_command(folder, tmp_path):
    for name, spoil in BY_HAND.items():
        spoilt = copy_of(folder, tmp_path / "spoilt")
        spoil(spoilt)
        if "sums" not in name:
            (spoilt / CHECKSUMS).unlink()
        assert ended(spoilt, tmp_path / "out") != "accepted", name
    print(f"{len(BY_HAND)} refused")
