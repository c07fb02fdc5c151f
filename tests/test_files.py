"""Replacing a file: whole or not at all, durable, and never through a link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from megadiff.files import AppendedFile, clear_temporaries, is_storage_failure, write_atomically
from tests.support.disk import watched_disk


def test_content_name_and_order_are_durable(tmp_path):
    """Content before the name, the folder after it: else a power cut leaves an empty file under the right name."""
    done = []
    with watched_disk(done.append):
        write_atomically(tmp_path / "a", "new")
    kinds = [what.split()[0] for what in done if what.split()[0] in ("fsync", "replace", "rename")]
    assert kinds == ["fsync", "replace", "fsync"]
    assert (tmp_path / "a").read_text() == "new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_failure_at_any_point_leaves_only_the_old_file(tmp_path, number):
    path = tmp_path / "a"
    path.write_text("old")
    changes = []
    with watched_disk(changes.append):
        write_atomically(path, "new")
    for k in range(len(changes)):
        path.write_text("old")
        count = [0]

        def refuse(what, k=k, count=count):
            count[0] += 1
            if count[0] == k + 1:
                raise OSError(number, os.strerror(number))

        with watched_disk(refuse), pytest.raises(OSError, match=os.strerror(number)):
            write_atomically(path, "new")
        assert path.read_text() in ("old", "new")
        assert os.listdir(tmp_path) == ["a"]
    assert is_storage_failure(OSError(number, "")) == (number != errno.EROFS)


def test_no_link_is_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "a").symlink_to("precious")
    for name in (".a.tmp", ".a.0123456789abcdef.tmp"):
        (tmp_path / name).symlink_to("precious")
    write_atomically(tmp_path / "a", b"new")
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "precious").read_text() == "kept"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) & 0o600 == 0o600


def test_temporaries_have_names_that_nobody_can_foresee(tmp_path):
    names = []

    def note(what):
        if what.startswith("replace"):
            names.append(Path(what.split()[1]).name)

    with watched_disk(note):
        for _ in range(3):
            write_atomically(tmp_path / "a", "new")
    assert len(set(names)) == 3


def test_what_killed_writes_left_is_cleared_and_nothing_else(tmp_path):
    (tmp_path / ".status.json.0123456789abcdef.tmp").touch()
    kept = [".step_00000002.tmp", ".lock", "a.0123456789abcdef.tmp", ".a.0123456789abcdef.tmp.txt"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".b.0123456789abcdef.tmp").symlink_to(tmp_path / ".lock")
    clear_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, ".b.0123456789abcdef.tmp"])


def test_an_appended_file_can_forget_what_is_too_much_to_wait(tmp_path):
    file = AppendedFile(tmp_path / "none" / "log", most_waiting=10)
    assert isinstance(file.append(b"12345678\n"), FileNotFoundError)
    assert isinstance(file.append(b"too much\n"), FileNotFoundError)
    (tmp_path / "none").mkdir()
    assert file.flush() is None
    assert file.close()
    assert (tmp_path / "none" / "log").read_bytes() == b"12345678\n"
