"""The paper's whole block on every layout, with both optimizers, plain and distributed; LaProp across resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megadiff.run.config import RunConfig
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, Trained, toy_config, train_all, write_corpus

STEPS = 5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_pp2_dp2": (8, {"tensor": 2, "pipeline": 2, "sequence": True}),
}
OPTIMIZERS = {
    "laprop": {"name": "laprop", "lr": 0.3, "parametrisation": "completep", "eps_calibration": "sum"},
    "adamw": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.1, "clip_grad": 1.0},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def _config(corpus: Path, folder: Path, optimizer: str, parallel: dict[str, Any], **dotted: Any) -> RunConfig:
    block = {f"model__{key}": value for key, value in GIDD_BLOCK.items()}
    small = {"model__layers": 2, "data__valid": []}
    tree = {"optimizer": OPTIMIZERS[optimizer], "parallel": parallel, **small, **block, **dotted}
    return toy_config(corpus, folder, **{"schedule__steps": STEPS, **tree})


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("alone")
    configs = [_config(corpus, folder / name, name, {}) for name in OPTIMIZERS]
    return dict(zip(OPTIMIZERS, on_ranks(1, train_all, configs, 1)[0], strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_block_trains_alike_on_every_layout(
    corpus: Path, tmp_path: Path, alone: dict[str, Trained], layout: str
) -> None:
    ranks, parallel = LAYOUTS[layout]
    cases = [(name, is_sharded) for name in OPTIMIZERS for is_sharded in (False, True)]
    configs = [
        _config(corpus, tmp_path / f"{name}-{is_sharded}", name, {**parallel, "distributed_optimizer": is_sharded})
        for name, is_sharded in cases
    ]
    for (name, _), trained in zip(cases, on_ranks(ranks, train_all, configs, ranks)[0], strict=True):
        assert trained.curve("loss") == pytest.approx(alone[name].curve("loss"), rel=1e-5)
        assert trained.curve("grad_norm") == pytest.approx(alone[name].curve("grad_norm"), rel=1e-4)


HALF, WHOLE = 3, 5


@pytest.fixture(scope="module")
def laprop(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    """`{(name, is_sharded): (loss, gradient norm) by step}`; each number of ranks is started once for both kinds."""
    found = {}
    folders = {is_sharded: tmp_path_factory.mktemp("laprop") for is_sharded in (False, True)}

    def train(ranks: int, jobs: list[tuple[str, int]], **parallel: Any) -> None:
        cases = [(*job, is_sharded) for job in jobs for is_sharded in folders]
        configs = [
            _config(
                corpus,
                folders[is_sharded],
                "laprop",
                {**parallel, "distributed_optimizer": is_sharded},
                name=name,
                schedule__steps=steps,
                schedule__decay_steps=0,
                checkpoint__every=HALF,
                checkpoint__keep=0,
            )
            for name, steps, is_sharded in cases
        ]
        for (name, _, is_sharded), trained in zip(
            cases, on_ranks(ranks, train_all, configs, ranks, save=True)[0], strict=True
        ):
            found[name, is_sharded] = list(zip(trained.curve("loss"), trained.curve("grad_norm"), strict=True))

    train(4, [("whole", WHOLE), ("halves", HALF)], tensor=2)
    for folder in folders.values():
        shutil.copytree(folder / "halves", folder / "moved")
    train(4, [("halves", WHOLE)], tensor=2)
    train(2, [("moved", WHOLE)], pipeline=2)
    return found


@pytest.mark.parametrize("is_sharded", [False, True])
def test_laprop_goes_on_bit_for_bit_and_on_another_layout(
    laprop: dict[tuple[str, bool], list[tuple[float, float]]], is_sharded: bool
) -> None:
    whole, moved = laprop["whole", is_sharded], laprop["moved", is_sharded]
    assert len(whole) == WHOLE
    assert laprop["halves", is_sharded] == whole
    for (loss, norm), (loss_there, norm_there) in zip(whole, moved, strict=True):
        assert loss_there == pytest.approx(loss, rel=1e-5)
        assert norm_there == pytest.approx(norm, rel=1e-4)
