"""What a checkpoint holds is what the run has, whatever overlaps; and a resumed run uses its own settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.support.ranks import on_ranks
from tests.support.runs import gradient_buckets_of, toy_config, train_on_rank, wire_on_rank, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def _saved(folder: Path, key: str) -> torch.Tensor:
    size = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata[key].size  # type: ignore[union-attr]
    state = {key: torch.zeros(size)}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state[key]


def test_overlapped_gathering_saves_the_weights_of_this_step(corpus: Path, tmp_path: Path) -> None:
    saved = []
    for overlap in (False, True):
        config = toy_config(
            corpus,
            tmp_path,
            name=f"overlap-{overlap}",
            data__valid=[],
            schedule__steps=4,
            parallel={
                "distributed_optimizer": True,
                "overlap_grad_reduce": overlap,
                "overlap_param_gather": overlap,
            },
        )
        on_ranks(2, train_on_rank, config, 2, save=True)
        saved.append(_saved(config.folder / "checkpoints" / "step_00000004", "decoder.layers.mlp.linear_fc1.weight"))
    assert torch.equal(*saved)


def _train_in_small_buckets(config: Any, world_size: int) -> int:
    """Train with many gradient buckets, most of which end in padding; return their number."""
    counted: list[int] = []
    with gradient_buckets_of(3000):
        train_on_rank(config, world_size, save=True, change=lambda run: counted.append(_padded_buckets(run)))
    return counted[0]


def _padded_buckets(run: Any) -> int:
    buckets = [bucket for chunk in run.step.chunks for buffer in chunk.buffers for bucket in buffer.buckets]
    return sum(bucket.numel_unpadded < bucket.grad_data.numel() for bucket in buckets[:-1])


def test_moments_behind_padded_gradient_buckets_are_saved_as_they_are(corpus: Path, tmp_path: Path) -> None:
    """Real models have many buckets when reduction overlaps; here they are made small."""
    saved = []
    for is_sharded in (False, True):
        config = toy_config(
            corpus,
            tmp_path,
            name=f"sharded-{is_sharded}",
            data__valid=[],
            schedule__steps=3,
            parallel={"distributed_optimizer": is_sharded, "overlap_grad_reduce": True},
        )
        train = _train_in_small_buckets if is_sharded else train_on_rank
        found = on_ranks(2, train, config, 2, **({} if is_sharded else {"save": True}))
        assert not is_sharded or found[0] > 3
        folder = config.folder / "checkpoints" / "step_00000003"
        keys = [key for key in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata if "exp_avg." in key]
        saved.append({key: _saved(folder, key) for key in keys})
    assert saved[0].keys() == saved[1].keys()
    assert len(saved[0]) > 8
    for key, moment in saved[0].items():
        torch.testing.assert_close(saved[1][key], moment, rtol=1e-5, atol=1e-9, msg=key)


def _betas_and_decay(config: Any) -> list[tuple[Any, ...]]:
    run = wire_on_rank(config, 1)
    run.close()
    return [(group["betas"], group["weight_decay"], group["eps"]) for group in run.step.optimizer._wrapped.param_groups]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_resumed_run_uses_its_own_optimizer_settings(corpus: Path, tmp_path: Path, is_sharded: bool) -> None:
    parallel = {"distributed_optimizer": is_sharded}
    before = toy_config(corpus, tmp_path, data__valid=[], schedule__steps=3, parallel=parallel)
    on_ranks(1, train_on_rank, before, 1, save=True)
    after = toy_config(
        corpus, tmp_path, data__valid=[], parallel=parallel, optimizer__beta2=0.95, optimizer__weight_decay=0.3
    )
    found = on_ranks(1, _betas_and_decay, after)[0]
    assert {betas for betas, _, _ in found} == {(0.9, 0.95)}
    assert max(decay for _, decay, _ in found) == 0.3
