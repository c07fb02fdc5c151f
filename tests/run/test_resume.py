"""A finished run that is started again, one that goes on after its rate had fallen, and one with its weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import write_yaml
from tests.support.forked_command import Ended, call_forked
from tests.support.runs import toy_tree


@pytest.fixture(scope="module")
def finished(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the description and the folder of a run of four steps whose rate falls from step 2."""
    folder = tmp_path_factory.mktemp("finished")
    schedule = {"steps": 4, "warmup_steps": 1, "decay_steps": 2}
    tree = toy_tree(toy_corpus, folder, model__layers=1, data__valid=[], schedule=schedule)
    description = write_yaml(folder / "run.yaml", tree)
    ended = call_forked("pretrain_dlm.py", "--config", description)
    assert ended.code == 0, ended.err
    return description, folder / tree["name"]


def _again(description: Path, *words: str) -> Ended:
    ended = call_forked("pretrain_dlm.py", "--config", description, *words)
    assert ended.code == 0, ended.err
    return ended


def test_a_finished_run_trains_nothing_and_says_so(finished: tuple[Path, Path]) -> None:
    description, folder = finished
    before = (folder / "config.yaml").read_bytes(), (folder / "metrics.jsonl").read_bytes()
    ended = _again(description, "optimizer.lr=0.5")
    assert "has already taken its 4 steps: nothing is trained; to go on, set schedule.steps above that" in ended.out
    assert before == ((folder / "config.yaml").read_bytes(), (folder / "metrics.jsonl").read_bytes())


def test_going_on_after_the_rate_has_fallen_is_warned_of(finished: tuple[Path, Path]) -> None:
    description, _ = finished
    warning = (
        "warning           the learning rate has been falling since step 2, as this run was to end at step 4; it rises"
    )
    assert warning in _again(description, "schedule.steps=9", "--check").out
    assert "has been falling" not in _again(description, "--check").out


def test_a_start_with_weights_alone_resumes_nothing(finished: tuple[Path, Path]) -> None:
    description, folder = finished
    start = folder / "checkpoints/step_00000004"
    branch = ["name=branch", f"checkpoint.start_from={start}", "checkpoint.weights_only=true", "schedule.steps=9"]
    foreseen = _again(description, *branch, "--check").out
    assert f"weights of        {start}, with a new optimizer and schedule from step 0 on" in foreseen
    assert not [line for line in foreseen.splitlines() if "resumes from" in line or "has been falling" in line]


def test_weights_that_predict_at_other_positions_are_warned_of(finished: tuple[Path, Path]) -> None:
    description, folder = finished
    start = f"checkpoint.start_from={folder / 'checkpoints/step_00000004'}"
    branch = ["name=moved", start, "checkpoint.weights_only=true", "schedule.steps=2", "schedule.decay_steps=0"]
    warning = "model.alignment is shifted, but these weights were trained to predict the token at each position"
    assert f"warning           {warning}" in _again(description, *branch, "model.alignment=shifted", "--check").out
    trained = _again(description, *branch, "model.alignment=shifted")
    assert warning in trained.out + trained.err
    assert "model.alignment is" not in _again(description, *branch, "name=unmoved", "--check").out
