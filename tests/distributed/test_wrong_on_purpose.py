"""What megadiff does about megatron-core's silent traps, undone: each test here must see the damage."""

from __future__ import annotations

import shutil
from unittest.mock import patch

from tests.support.ranks import on_ranks
from tests.support.runs import largest_relative_difference, platform_on_rank, toy_config, train_on_rank

STEPS = 6
DISTOPT = {"parallel__distributed_optimizer": True, "data__valid": [], "schedule__steps": STEPS}


def _batched(run):
    for chunk in run.step.chunks:
        chunk.config.batch_p2p_comm = True


def _interleaved(config):
    """Step-one gradient norms with our settings and with megatron-core's default."""
    right = train_on_rank(config, 2)
    return right.curve("grad_norm"), train_on_rank(config, 2, change=_batched).curve("grad_norm")


def _sums_cut_gains(run):
    run.step.chunks[0].config.qk_layernorm = True


def _cut_gains(config):
    """Gradient norms with gains of queries and keys that are cut over ranks, then with megatron-core's sum of them."""
    right = train_on_rank(config, 2)
    return right.curve("grad_norm"), train_on_rank(config, 2, change=_sums_cut_gains).curve("grad_norm")


def _error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _default_sharding(config):
    """What saving says under the sharding type megatron-core takes by default."""
    with patch("megadiff.checkpoint.save._SHARDING", {"chained_optim_avoid_prefix": True}):
        return _error_of(train_on_rank, config, 2, save=True)


def _stock_optimizer(config, without_clone):
    """Resume with the stock distributed optimizer, and with one whose `step` tensors stay shared after the load."""
    platform_on_rank()
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megadiff.optim.optimizer import ShardedOptimizer

    class SharedStep(ShardedOptimizer):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            states = list(self.optimizer.state.values())
            for state in states:
                state["step"] = states[0]["step"]

    def stock(member, *args, **kwargs):
        return DistributedOptimizer(*args, **kwargs)

    whole = train_on_rank(config, 1, save=True)
    shutil.rmtree(config.folder / f"checkpoints/step_{STEPS:08d}")
    shutil.copytree(config.folder, without_clone.folder)
    optimizer = "megadiff.optim.optimizer.ShardedOptimizer"
    with patch(optimizer, SharedStep):
        drifted = train_on_rank(without_clone, 1)
    with patch(optimizer, stock):
        return whole.curve("loss"), drifted.curve("loss"), _error_of(train_on_rank, config, 1)


def test_batched_p2p_between_two_interleaved_stages_gives_wrong_gradients(toy_corpus, tmp_path):
    config = toy_config(
        toy_corpus,
        tmp_path,
        parallel__pipeline=2,
        parallel__virtual_pipeline=2,
        schedule__steps=4,
        data__valid=[],
    )
    right, wrong = on_ranks(2, _interleaved, config)[0]
    assert abs(wrong[0] / right[0] - 1) > 0.1


def test_summing_cut_gains_over_tensor_ranks_gives_wrong_gradients(toy_corpus, tmp_path):
    config = toy_config(
        toy_corpus, tmp_path, parallel__tensor=2, model__qk_norm="full", schedule__steps=3, data__valid=[]
    )
    right, wrong = on_ranks(2, _cut_gains, config)[0]
    assert largest_relative_difference(wrong, right) > 1e-4


def test_the_default_sharding_type_cannot_be_saved(toy_corpus, tmp_path):
    error = on_ranks(2, _default_sharding, toy_config(toy_corpus, tmp_path, **DISTOPT))[0]
    assert error is not None
    assert "flattened_range" in error


def test_the_stock_distributed_optimizer_cannot_be_resumed_or_drifts(toy_corpus, tmp_path):
    configs = [
        toy_config(toy_corpus, tmp_path, name=name, checkpoint__every=2, checkpoint__keep=0, **DISTOPT)
        for name in ("stock", "shared")
    ]
    whole, drifted, stock_error = on_ranks(1, _stock_optimizer, *configs)[0]
    assert stock_error is not None
    assert stock_error.startswith(("AssertionError", "KeyError", "CheckpointError")), stock_error
    assert drifted[:5] == whole[:5]
    assert largest_relative_difference(drifted[5:], whole[5:]) > 1e-6, "the first loss is right, later ones are not"
