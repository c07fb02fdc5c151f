"""The paper's whole block on every layout, with both optimizers, plain and distributed; LaProp across resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadiff.run.config import RunConfig
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, Trained, toy_config, train_all, train_on_rank, write_corpus

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


@pytest.mark.parametrize("is_sharded", [False, True])
def test_laprop_goes_on_bit_for_bit_and_on_another_layout(corpus: Path, tmp_path: Path, is_sharded: bool) -> None:
    def curve(name: str, steps: int, ranks: int, **parallel: Any) -> list[tuple[float, float]]:
        config = _config(
            corpus,
            tmp_path,
            "laprop",
            {**parallel, "distributed_optimizer": is_sharded},
            name=name,
            schedule__steps=steps,
            schedule__decay_steps=0,
            checkpoint__every=4,
            checkpoint__keep=0,
        )
        trained = on_ranks(ranks, train_on_rank, config, ranks, save=True)[0]
        return list(zip(trained.curve("loss"), trained.curve("grad_norm"), strict=True))

    whole = curve("whole", 7, 4, tensor=2)
    curve("halves", 4, 4, tensor=2)
    assert curve("halves", 7, 4, tensor=2) == whole
    curve("moved", 4, 4, tensor=2)
    moved = curve("moved", 7, 2, pipeline=2)
    for (loss, norm), (loss_there, norm_there) in zip(whole, moved, strict=True):
        assert loss_there == pytest.approx(loss, rel=1e-5)
        assert norm_there == pytest.approx(norm, rel=1e-4)
