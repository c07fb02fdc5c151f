"""What is computed again in the backward pass changes neither losses nor gradients nor weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, toy_config, wire_on_rank

pytestmark = pytest.mark.timeout(1800)

BLOCKS = {"plain": {}, "gidd": {f"model__{key}": value for key, value in GIDD_BLOCK.items()}}
RECOMPUTE = {
    "none": {},
    "full": {"parallel__recompute": "full"},
    "full_of_one": {"parallel__recompute": "full", "parallel__recompute_layers": 1},
    "mlp": {"parallel__recompute": "selective"},
    "layernorm": {"parallel__recompute": "selective", "parallel__recompute_modules": ["layernorm"]},
    "everything": {
        "parallel__recompute": "selective",
        "parallel__recompute_modules": ["core_attn", "layernorm", "mlp"],
    },
}
LAYOUTS = {
    "one": {},
    "tp2_sp": {"parallel__tensor": 2, "parallel__sequence": True},
    "pp2": {"parallel__pipeline": 2},
    "pp2_vp2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
}
CASES = [
    *(("one", block, recompute) for block in BLOCKS for recompute in RECOMPUTE),
    *(
        (layout, "gidd", recompute)
        for layout in LAYOUTS
        if layout != "one"
        for recompute in ("none", "full", "everything")
    ),
]
PROMPTS = {"conditioning__prompt": 0.5, "conditioning__prompt_attention": "causal"}


@pytest.fixture(scope="module")
def trained(toy_corpus, tmp_path_factory):
    """`{(layout, block, recompute): what each rank found}`."""
    output = tmp_path_factory.mktemp("runs")
    found = {}
    for ranks in (1, 2):
        cases = [case for case in CASES if (case[0] == "one") == (ranks == 1)]
        configs = [
            toy_config(
                toy_corpus,
                output,
                name="-".join(case),
                schedule__steps=3,
                schedule__warmup_steps=0,
                data__valid=[],
                **PROMPTS,
                **LAYOUTS[case[0]],
                **BLOCKS[case[1]],
                **RECOMPUTE[case[2]],
            )
            for case in cases
        ]
        results = on_ranks(ranks, _train_all, configs, ranks, timeout_s=500)
        found.update({case: [rank[index] for rank in results] for index, case in enumerate(cases)})
    return found


def _train_all(configs, world_size):
    return [_train(config, world_size) for config in configs]


def _train(config, world_size):
    """Totals and norms of three steps, this rank's weights after them, and the bytes a forward pass keeps."""
    run = wire_on_rank(config, world_size)
    curve, kept = [], None
    for done in range(config.steps):
        sequences = [next(run.microbatches) for _ in range(run.microbatches_of(done))]
        if world_size == 1 and kept is None:
            kept = _kept_bytes(run.step.chunks[0], sequences[0].noised)
        taken = run.step(sequences, run.peak_lr)
        curve.append([*taken.sums.tolist(), taken.grad_norm])
    weights = [parameter.detach().numpy() for chunk in run.step.chunks for parameter in chunk.parameters()]
    run.close()
    return curve, weights, kept


def _kept_bytes(chunk, ids):
    """Of distinct storages a forward pass still holds for its backward, parameters aside."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = chunk(ids)
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    del output
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize(("layout", "block", "recompute"), [case for case in CASES if case[2] != "none"])
def test_recomputing_changes_no_loss_gradient_norm_or_weight(trained, layout, block, recompute):
    """Not a bit; but where norms are recomputed a block's two gradients of its input are added in another order."""
    rounding = 1e-6 if recompute in ("layernorm", "everything") else 0.0
    for plain, again in zip(trained[layout, block, "none"], trained[layout, block, recompute], strict=True):
        np.testing.assert_allclose(again[0], plain[0], rtol=rounding, atol=0)
        for one, other in zip(again[1], plain[1], strict=True):
            np.testing.assert_allclose(one, other, rtol=rounding, atol=10 * rounding)


def test_a_forward_pass_keeps_less_the_more_is_recomputed(trained):
    kept = {name: trained["one", "plain", name][0][2] for name in RECOMPUTE}
    assert kept["full"] < kept["everything"] < kept["mlp"] < kept["none"]
    assert kept["full"] < kept["full_of_one"] < kept["none"]
    assert kept["layernorm"] < kept["none"]
    # Two microbatch sequences of 16 tokens, 4 blocks of width 32 in float32: the norms' outputs, and the MLP's middle
    # twice.
    tokens, width, layers = 2 * 16, 32, 4
    assert kept["none"] - kept["layernorm"] >= 4 * tokens * layers * 2 * width
    # megatron-core's own layer, which recomputes parts, keeps a table of cosines and sines for the queries and one for
    # the keys of every block; the others share one.
    rotation = 4 * 16 * 2 * 8
    assert kept["none"] - kept["mlp"] == 4 * tokens * layers * 2 * 4 * width - (2 * layers - 1) * rotation
