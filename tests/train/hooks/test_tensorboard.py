"""TensorBoard's own reader finds the points that were written, those of a resumed run once."""

from __future__ import annotations

import errno
import os

import torch

from megadiff.parallel.step_metrics import SIZE
from megadiff.platform.machine import detect
from megadiff.train.hooks import MetricSinks, StepInfo
from megadiff.train.hooks.log import LogHook
from megadiff.train.hooks.tensorboard import TensorBoard


def _points(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in reader.Scalars("train/loss")] if reader.Tags()["scalars"] else []


def _written(folder, steps, *, after_step=0):
    board = TensorBoard(folder, after_step=after_step)
    for step in steps:
        board.write({"step": step, "loss": step / 4}, step)
    return board


def test_points_are_read_as_they_were_written_before_the_file_is_closed(tmp_path):
    board = _written(tmp_path / "tensorboard", range(1, 5))
    assert _points(tmp_path / "tensorboard") == [(step, step / 4) for step in range(1, 5)]
    board.close()


def test_repeated_steps_are_shown_once_and_earlier_files_stay_unchanged(tmp_path):
    _written(tmp_path, range(1, 6)).close()
    (earlier,) = tmp_path.iterdir()
    before = earlier.read_bytes()
    _written(tmp_path, range(4, 7), after_step=3).close()
    assert [step for step, _ in _points(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert earlier.read_bytes() == before


def test_a_run_draws_every_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, after_step=0)
    info = StepInfo(1, torch.arange(1.0, SIZE + 1, dtype=torch.float64), 1e-3, 2.0, 0.5, None)
    LogHook(
        every=1,
        steps=1,
        tokens_before=lambda step: 100 * step,
        flops_per_token=1e6,
        flops_by_count={"deepseek": 2e6, "full": 3e6},
        executed_flops=lambda sums: 1e5,
        world_size=1,
        platform=detect("cpu"),
        sinks=MetricSinks([board]),
        epochs=lambda step: {"a": 0.5, "b": 0.25},
    )(info)
    board.write({"step": 1, "eval_elbo": 3.0}, 1)
    board.close()
    tags = set(EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"])
    training = ("loss", "elbo", "kl", "itakura_saito", "weight", "lr", "grad_norm", "tokens_per_s")
    assert tags >= {*(f"train/{key}" for key in training), "epochs/a", "epochs/b", "eval/elbo"}


def test_points_that_a_full_disk_refuses_come_when_there_is_room(tmp_path, monkeypatch, caplog):
    folder = tmp_path / "tensorboard"
    board = _written(folder, [1])
    write, room = os.write, [5]

    def refuse(handle, data):
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data[: room.pop()])

    monkeypatch.setattr(os, "write", refuse)
    caplog.set_level("WARNING", logger="megadiff")
    board.write({"step": 2, "loss": 0.5}, 2)
    monkeypatch.undo()
    board.write({"step": 3, "loss": 0.75}, 3)
    board.close()
    assert [step for step, _ in _points(folder)] == [1, 2, 3]
    assert len(caplog.messages) == 1
    assert "cannot be written (No space left on device); training goes on without it" in caplog.messages[0]
