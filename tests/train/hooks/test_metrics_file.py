from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from megadiff.metric_lines import read_metrics
from megadiff.train.hooks.metrics_file import MetricsFile


def lines(*steps):
    return "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in steps)


def test_a_float_keeps_every_digit(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    file.write({"step": 1, "loss": 0.1 + 0.2}, 1)
    file.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.30000000000000004}]


def test_non_finite_numbers_are_null_in_json_at_any_depth(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    bins = [[-9.0, -6.0, math.nan], (1, True, math.inf)]
    file.write({"step": 1, "loss": -math.inf, "bins": bins, "of": {"x": math.nan, "y": "NaN"}}, 1)
    file.close()
    line = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    wanted = {"step": 1, "loss": None, "bins": [[-9.0, -6.0, None], [1, True, None]], "of": {"x": None, "y": "NaN"}}
    assert line == wanted


def test_a_line_is_there_before_the_file_is_closed(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    file.write({"step": 1}, 1)
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]
    file.sync()
    file.close()


def test_a_resumed_run_forgets_the_lines_it_will_write_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(lines(1, 2, 3, 4))
    file = MetricsFile(path, after_step=2)
    file.write({"step": 3, "loss": 0.0}, 3)
    file.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    assert path.read_text().startswith(lines(1, 2))


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', '{"step": 3}', "\x00\x00\x00", "[1]\n", "nonsense\n", '{"loss": 1}\n']
)
def test_a_torn_or_foreign_line_is_dropped(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    path.write_text(lines(1, 2) + torn)
    MetricsFile(path, after_step=5).close()
    assert path.read_text() == lines(1, 2)


def test_a_run_from_the_start_begins_an_empty_file(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(lines(0, 1, 2))
    MetricsFile(path, after_step=0).close()
    assert path.read_text() == ""


def test_an_evaluation_line_of_the_checkpoints_step_stays(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(lines(2) + '{"step": 2, "eval_elbo": 5.0}\n' + lines(3))
    MetricsFile(path, after_step=2).close()
    assert [sorted(line) for line in read_metrics(path)] == [["loss", "step"], ["eval_elbo", "step"]]


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path / "m.jsonl") == []


class Disk:
    """Takes half a line and no more while it is full, as a file system does that fills up."""

    def __init__(self, monkeypatch):
        self.is_full = self.drops_on_sync = False
        self._has_room_for_half = True
        self._write, self._fsync = os.write, os.fsync
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "fsync", self.fsync)

    def write(self, handle, data):
        if not self.is_full:
            return self._write(handle, data)
        if not self._has_room_for_half:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._has_room_for_half = False
        return self._write(handle, data[: len(data) // 2])

    def fsync(self, handle):
        if self.drops_on_sync:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(handle)


def test_lines_that_a_full_disk_refuses_come_later_whole_and_once(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    disk = Disk(monkeypatch)
    file = MetricsFile(path, after_step=0)
    file.write({"step": 1}, 1)
    disk.is_full = True
    file.write({"step": 2}, 2)
    file.write({"step": 3}, 3)
    assert [line["step"] for line in read_metrics(path)] == [1]
    with pytest.raises(OSError, match="No space left on device"):
        file.sync()
    disk.is_full = False
    file.write({"step": 4}, 4)
    file.close()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))


def test_lines_that_a_disk_may_have_dropped_are_written_again(tmp_path, monkeypatch):
    """After a failed sync the kernel counts its pages as clean, whether they reached the disk or not."""
    path = tmp_path / "metrics.jsonl"
    disk = Disk(monkeypatch)
    file = MetricsFile(path, after_step=0)
    file.write({"step": 1}, 1)
    file.sync()
    file.write({"step": 2}, 2)
    disk.drops_on_sync = True
    with pytest.raises(OSError, match="Input/output error"):
        file.sync()
    disk.drops_on_sync = False
    path.write_text('{"step": 1}\n\0\0\0\0')  # what a disk leaves that has dropped a page
    file.write({"step": 3}, 3)
    file.sync()
    file.close()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3))


def test_lines_that_a_resumed_run_drops_move_to_a_file_beside_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2, 3).encode() + b'{"step": 4, "lo')
    MetricsFile(path, after_step=2).close()
    assert path.read_text() == lines(1, 2)
    beside = tmp_path / "metrics.superseded.jsonl"
    assert beside.read_bytes() == lines(3).encode() + b'{"step": 4, "lo\n'
    path.write_bytes(lines(1, 2, 3, 4).encode())
    MetricsFile(path, after_step=0).close()
    assert path.read_text() == ""
    assert beside.read_bytes() == lines(3).encode() + b'{"step": 4, "lo\n' + lines(1, 2, 3, 4).encode()
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "metrics.superseded.jsonl"]


def test_a_link_in_the_place_of_the_file_beside_is_not_written_through(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2))
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "metrics.superseded.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        MetricsFile(path, after_step=1)
    assert (tmp_path / "precious").read_text() == "kept"
    assert path.read_text() == lines(1, 2)


def test_a_file_of_which_nothing_moves_is_not_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2))
    inode = path.stat().st_ino
    MetricsFile(path, after_step=2).close()
    assert (path.read_text(), path.stat().st_ino) == (lines(1, 2), inode)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_link_in_the_place_of_the_file_is_replaced_and_its_target_kept(tmp_path, link):
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "elsewhere").write_text(lines(1, 2))
    link(path, tmp_path / "elsewhere")
    file = MetricsFile(path, after_step=2)
    file.write({"step": 3, "loss": 0.0}, 3)
    file.close()
    assert (tmp_path / "elsewhere").read_text() == lines(1, 2)
    assert not path.is_symlink()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
