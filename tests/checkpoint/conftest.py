"""A run with three checkpoints, made once, and a copy of it for every test."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest

from megadiff.run.config import RunConfig
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank

STEPS = (2, 4, 6)


def _saved_on_rank(config):
    train_on_rank(config, 1, save=True)
    return [process.name() for process in psutil.Process().children(recursive=True)]


@pytest.fixture(scope="session")
def original(toy_corpus, tmp_path_factory):
    """The run's description, and the processes that were left when it had ended."""
    config = toy_config(
        toy_corpus,
        tmp_path_factory.mktemp("folder"),
        model__layers=1,
        data__valid=[],
        schedule__steps=STEPS[-1],
        checkpoint__every=2,
        checkpoint__keep=0,
    )
    children = on_ranks(1, _saved_on_rank, config)[0]
    return config, children


@pytest.fixture
def run(original, tmp_path):
    config, _ = original
    shutil.copytree(config.folder, tmp_path / "toy")
    return config.model_copy(update={"output_dir": str(tmp_path)})


def checkpoint(config: RunConfig, step: int) -> Path:
    """A step folder of the run."""
    return config.folder / f"checkpoints/step_{step:08d}"


def shard_of(folder: Path) -> Path:
    """One of its shards."""
    return next(folder.glob("*.distcp"))
