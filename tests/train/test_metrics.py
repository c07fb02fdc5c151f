from __future__ import annotations

import json
import math

import pytest

from megadiff.train.metrics import MetricsFile, read_metrics


def lines(*steps):
    return "".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in steps)


def test_a_float_keeps_every_digit(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    file.write({"step": 1, "loss": 0.1 + 0.2})
    file.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 0.30000000000000004}]


def test_what_is_not_finite_is_null_at_any_depth_for_json_has_no_token_for_it(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", after_step=0)
    bins = [[-9.0, -6.0, math.nan], (1, True, math.inf)]
    file.write({"step": 1, "loss": -math.inf, "bins": bins, "of": {"x": math.nan, "y": "NaN"}})
    file.close()
    line = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail)
    wanted = {"step": 1, "loss": None, "bins": [[-9.0, -6.0, None], [1, True, None]], "of": {"x": None, "y": "NaN"}}
    assert line == wanted


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


def test_lines_that_a_full_disk_refuses_come_later_whole_and_once(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    file.write({"step": 1})

    class Full:
        """Takes the first half of a line and no more, as a file system does that fills up."""

        def __init__(self, real):
            self.real = real

        def write(self, data):
            return self.real.write(data[: len(data) // 2])

        def __getattr__(self, name):
            return getattr(self.real, name)

    real = file._file
    file._file = Full(real)
    file.write({"step": 2})
    file.write({"step": 3})
    assert [line["step"] for line in read_metrics(path)] == [1]
    file._file = real
    file.write({"step": 4})
    file.close()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
