"""What is read from a run folder, whole or damaged, and that reading changes nothing."""

from __future__ import annotations

import json

import pytest

from megadiff.errors import DataError
from megadiff.report.run_record import (
    UnusualStep,
    differences,
    levels,
    read_metric_lines,
    read_runs,
    read_settings,
    wall_time,
)
from megadiff.supervision.status import RUNNING, Status, write_status
from megadiff.train.goodput import Attempt, write_attempts
from tests.report.folders import evaluation_line, training_line, write_run


def test_a_torn_last_line_is_left_out_and_not_called_damage(tmp_path):
    folder = write_run(tmp_path / "run", [evaluation_line(0), training_line(1)], tail='{"step": 2, "lo')
    found = read_metric_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in found.training] == [1]
    assert [line["step"] for line in found.evaluations] == [0]
    assert found.unreadable == 0


def test_damaged_lines_are_counted_and_the_rest_is_read(tmp_path):
    tail = '{"step": "two"}\n[3]\n\x00\x00\n{"step": true}\n\n' + json.dumps(training_line(4)) + "\n"
    found = read_metric_lines(write_run(tmp_path / "run", [training_line(1)], tail=tail) / "metrics.jsonl")
    assert [line["step"] for line in found.training] == [1, 4]
    assert found.unreadable == 4


def test_the_later_line_of_a_step_counts(tmp_path):
    folder = write_run(tmp_path / "run", [training_line(2), training_line(1), training_line(2, loss=9.0)])
    assert [(line["step"], line["loss"]) for line in read_metric_lines(folder / "metrics.jsonl").training] == [
        (1, 4.0),
        (2, 9.0),
    ]


def test_bins_that_are_none_are_left_out():
    assert levels({"bins": [[0, 3, 0.5], [3, 6, None], "x", [1]]}, "bins") == [(0.0, 3.0, 0.5)]
    assert levels({"bins": 3}, "bins") == []


def test_skipped_steps_and_spikes_are_found_once(tmp_path):
    folder = write_run(tmp_path / "run", [training_line(3, loss=None, skipped="non_finite"), training_line(9)])
    (folder / "log.txt").write_text(
        "2026-01-01 00:00:00,000 WARNING step 7: spike: loss 9 against 3 +- 1; the update was made; samples 0 to 7\n"
        "2026-01-01 00:00:09,000 WARNING step 7: spike: loss 9 against 3 +- 1; the update was made; samples 0 to 7\n"
        "2026-01-01 00:00:10,000 INFO step 8: spike: not a warning\n"
    )
    assert read_runs([folder])[0].unusual == [
        UnusualStep(3, True, "non-finite"),
        UnusualStep(7, False, "loss 9 against 3 +- 1; the update was made; samples 0 to 7"),
    ]


def test_a_damaged_goodput_file_stays_where_it_is(tmp_path):
    folder = write_run(tmp_path / "run", [training_line(1)])
    (folder / "goodput.json").write_text("[{]")
    assert read_runs([folder])[0].attempts is None
    assert sorted(path.name for path in folder.iterdir()) == ["goodput.json", "metrics.jsonl"]


def test_wall_time_adds_up_over_attempts(tmp_path):
    """60 s of steps in 100 s of two attempts and the 20 s between."""
    attempts = [
        Attempt(started=0, updated=50, elapsed_s=50, steps=5, phases={"setup": 10, "step": 35}),
        Attempt(started=70, updated=120, elapsed_s=50, down_s=20, phases={"setup": 10, "step": 25, "lost": 15}),
    ]
    folder = write_run(tmp_path / "run", [training_line(1)])
    write_attempts(folder / "goodput.json", attempts)
    found = wall_time(read_runs([folder])[0].attempts or [])
    assert found.total_s == 120
    assert found.goodput == pytest.approx(0.5)
    assert found.parts_s["other"] == pytest.approx(5.0)
    assert sum(found.parts_s.values()) == pytest.approx(120)


def test_checkpoints_that_are_not_whole_are_told_apart(tmp_path):
    folder = write_run(tmp_path / "run", [training_line(1)])
    for name in ("step_00000002", "step_00000001.bad", ".step_00000003.tmp"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints/step_00000002/part").write_bytes(b"1234")
    (folder / "LATEST").write_text("step_00000002\n")
    run = read_runs([folder])[0]
    assert run.latest == "step_00000002"
    assert "manifest.json" in run.checkpoints[0].why
    assert [(found.name, found.state, found.size_bytes) for found in run.checkpoints] == [
        ("step_00000002", "not loadable", 4),
        ("step_00000001.bad", "set aside", 0),
        (".step_00000003.tmp", "being written", 0),
    ]


def test_many_samples_are_thinned_and_long_ones_cut(tmp_path):
    folder = write_run(tmp_path / "run", [training_line(1)])
    (folder / "samples").mkdir()
    for step in range(100):
        (folder / "samples" / f"step_{step:08d}.txt").write_text("x" * 7000)
    (folder / "samples/notes.txt").write_text("no sample")
    found = read_runs([folder])[0].samples
    assert [sample.step for sample in found] == [0, 9, 18, 27, 36, 45, 54, 63, 72, 81, 90, 99]
    assert len(found[0].text) == 6000
    assert found[0].is_cut


def test_status_is_read(tmp_path):
    folder = write_run(tmp_path / "run", [training_line(1)])
    write_status(folder, Status.now(RUNNING, step=1, steps=9, environ={}))
    status = read_runs([folder])[0].status
    assert status is not None
    assert (status.state, status.steps) == ("running", 9)


def test_labels_distinguish_runs_of_one_name_and_repeats_count_once(tmp_path):
    folders = [write_run(tmp_path / place, [training_line(1)]) for place in ("a/run", "b/run")]
    assert [run.label for run in read_runs([*folders, folders[0] / "."])] == ["a/run", "b/run"]
    assert [run.label for run in read_runs(folders[:1])] == ["run"]


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path):
    folder = write_run(tmp_path / "sweep/one", [])
    with pytest.raises(DataError, match="nowhere is no folder; give the folder of a run"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"sweep holds no metrics.jsonl; its 1 subfolder\(s\) with one can be given as"):
        read_runs([folder.parent])
    with pytest.raises(DataError, match="holds no metrics yet; try again"):
        read_runs([folder])


def test_settings_are_flat_and_only_differences_are_told(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("name: a\nmodel: {layers: 4, sink: false}\ndata: {train: [{path: x, weight: 1.0}], valid: []}\n")
    found = read_settings(path)
    assert found == {
        "name": "a",
        "model.layers": "4",
        "model.sink": "false",
        "data.train[0].path": "x",
        "data.train[0].weight": "1.0",
        "data.valid": "[]",
    }
    other = {**found, "name": "b", "model.layers": "8", "model.softcap": "null"}
    assert differences([found, None, other]) == {
        "model.layers": ["4", None, "8"],
        "model.softcap": [None, None, "null"],
    }


@pytest.mark.parametrize("text", ["[1, 2]", "{", "a: !!python/object/apply:os.getcwd []"])
def test_settings_that_are_no_tree_are_said_to_be_missing(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert read_settings(path) is None
    assert read_settings(tmp_path / "none.yaml") is None


def test_settings_that_refer_to_themselves_end(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("a: &x {b: *x, c: 1}\n")
    found = read_settings(path)
    assert found is not None
    assert found["a.c"] == "1"
