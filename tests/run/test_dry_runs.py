"""Dry runs in a process of their own: the figures of the command, refusals as sentences, and a limit of time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megadiff.platform.quiet import quiet
from megadiff.run import dry_runs
from megadiff.run.config import RunConfig
from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree

with quiet():
    import megadiff.run.dry_run  # noqa: F401  before the fork

pytestmark = pytest.mark.timeout(300)


def test_answers_are_those_of_the_command(toy_corpus: Path, tmp_path: Path) -> None:
    fp8 = {"precision": {"compute": "bf16", "fp8": "delayed"}, "platform": "cuda", "model__hidden": 64}
    trees = [
        toy_tree(toy_corpus, tmp_path, parallel__pipeline=2, parallel__tensor=2),
        toy_tree(toy_corpus, tmp_path, precision__compile=True, parallel__tensor=2),
        toy_tree(toy_corpus, tmp_path, **fp8, batch__micro_batch_size=1),
    ]
    runs = [(RunConfig.model_validate(tree), ranks) for tree, ranks in zip(trees, (4, 2, 1), strict=True)]
    before = set(sys.modules)
    answers = dry_runs.dry_runs(runs, limit_s=250)
    assert answers is not None
    assert not {"megatron.core.optimizer"} & (set(sys.modules) - before)
    for index, ranks in ((0, 4), (2, 1)):
        answer, out = answers[index], tmp_path / "found.json"
        file = write_yaml(tmp_path / "run.yaml", trees[index])
        ended = call_forked("tools/dry_run.py", "--config", file, "--ranks", str(ranks), "--output", out)
        assert ended.code == 0, ended.err
        fullest = max(json.loads(out.read_text())["ranks"], key=lambda rank: rank["needed"])
        assert isinstance(answer, dry_runs.Fullest)
        assert (answer.rank, answer.total_bytes) == (fullest["rank"], fullest["needed"])
        assert answer.not_built == ("" if index == 0 else "FP8 copies of the weights, Transformer Engine's layers")
    assert isinstance(answers[1], dry_runs.Refused)
    assert answers[1].sentence.startswith("precision.compile does not work with parallel.tensor=2")


def test_no_answer_in_time_is_none(toy_corpus: Path, tmp_path: Path) -> None:
    run = RunConfig.model_validate(toy_tree(toy_corpus, tmp_path))
    assert dry_runs.dry_runs([(run, 1)], limit_s=0.01) is None


def test_a_description_that_cannot_be_read_is_refused_beside_the_others(toy_corpus: Path, tmp_path: Path) -> None:
    read = write_yaml(tmp_path / "0.yaml", toy_tree(toy_corpus, tmp_path))
    unread = write_yaml(tmp_path / "1.yaml", {**toy_tree(toy_corpus, tmp_path), "unheard": 1})
    assert isinstance(dry_runs.loaded(read), RunConfig)
    refused = dry_runs.loaded(unread)
    assert isinstance(refused, dry_runs.Refused)
    assert "unheard" in refused.sentence
