from __future__ import annotations

import json

import pytest

from megadiff.train.metrics import MetricsFile, read_metrics


def lines(*steps):
    return "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in steps)


def test_a_float_keeps_every_digit(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    file.write({"step": 1, "loss": 0.1 + 0.2})
    file.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.30000000000000004}]


def test_a_line_is_there_before_the_file_is_closed(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    file.write({"step": 1})
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]
    file.sync()
    file.close()


def test_a_resumed_run_forgets_the_lines_it_will_write_again(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(lines(1, 2, 3, 4))
    file = MetricsFile(path, after_step=2)
    file.write({"step": 3, "loss": 0.0})
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
