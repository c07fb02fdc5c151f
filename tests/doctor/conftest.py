"""A subject to examine, and one check of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megadiff.doctor.examination import Subject, all_checks
from megadiff.platform.quiet import quiet
from megadiff.run import dry_runs
from tests.support.forked_command import call_forked
from tests.support.runs import toy_config, write_corpus

with quiet():
    import megadiff.run.dry_run  # noqa: F401  before the fork


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The findings are those of a CPU machine, also where there are GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def forked_dry_runs(monkeypatch):
    """Dry runs are made in forked processes, which start faster; `tests/run/test_dry_runs.py` starts real ones."""

    def run(command, **_):
        ended = call_forked("megadiff/run/dry_runs.py", *command[3:])
        return SimpleNamespace(returncode=ended.code, stdout=ended.out.encode(), stderr=ended.err)

    monkeypatch.setattr(dry_runs, "subprocess", SimpleNamespace(run=run, TimeoutExpired=TimeoutError))


@pytest.fixture
def findings_of():
    """All findings of one check: [(level, text, remedy)]; every one but OK says what to do."""

    def examine(name, subject):
        found = list(all_checks()[name](subject))
        assert all(bool(finding.remedy) == (finding.level != "OK") for finding in found)
        assert not any("\n" in finding.text + finding.remedy for finding in found)
        return [(finding.level, finding.text, finding.remedy) for finding in found]

    return examine


@pytest.fixture
def one_finding(findings_of):
    """The only finding of a check."""

    def examine(name, subject):
        (found,) = findings_of(name, subject)
        return found

    return examine


@pytest.fixture(scope="session")
def held_corpus(tmp_path_factory):
    """Prefix of a corpus for validation, kept apart from the one to train on and smaller than it."""
    return write_corpus(tmp_path_factory.mktemp("held") / "held", tokens=3000, seed=8)


@pytest.fixture
def subject_of(toy_corpus, held_corpus, tmp_path):
    """A toy run on this machine, with keys changed."""

    def make(ranks=1, environment=None, **dotted):
        dotted = {"data__valid": [str(held_corpus)], **dotted}
        return Subject(environment or {}, toy_config(toy_corpus, tmp_path / "runs", **dotted), wanted_ranks=ranks)

    return make
