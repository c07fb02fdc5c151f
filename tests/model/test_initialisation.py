"""First weights are a function of (seed, global name, place), whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest

from megadiff.model.cost import flops_per_token, paper_parameters, parameters
from megadiff.scaling.run_curves import flops_per_token_of, params_of
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, MODERN_BLOCK, toy_config
from tests.support.toy_model import build_on_rank, model_config

GIDD = {**GIDD_BLOCK, "layers": 4}
LAYOUTS = [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual": 2}]


def weights_on_rank(model, **layout):
    """`{global name: (this rank's part, cut dimension or None, tensor rank)}`."""
    from megadiff.model.initialisation import global_parameters

    chunks, topology = build_on_rank(model, **layout)
    found = {}
    for chunk in chunks:
        for name, parameter in global_parameters(chunk):
            is_cut = layout.get("tensor", 1) > 1 and getattr(parameter, "tensor_model_parallel", False)
            cut = parameter.partition_dim if is_cut else None
            found[name] = (parameter.detach().numpy().copy(), cut, topology.tensor_rank)
    return found


def _one_process(models, seeds):
    return [weights_on_rank(model, seed=seed) for model, seed in zip(models, seeds, strict=True)]


def _all_layouts(model):
    return [weights_on_rank(model, **layout) for layout in LAYOUTS]


def joined(ranks):
    """The whole model's weights from the parts of all ranks."""
    parts = {}
    for rank in ranks:
        for name, (part, cut, tensor_rank) in rank.items():
            parts.setdefault(name, {})[tensor_rank] = (part, cut)
    whole = {}
    for name, by_rank in parts.items():
        first, cut = by_rank[0]
        whole[name] = first if cut is None else np.concatenate([by_rank[i][0] for i in sorted(by_rank)], axis=cut)
    return whole


@pytest.fixture(scope="module")
def alone():
    """Weights in one process: the paper's block, again, another seed, and one with fewer layers."""
    gidd = model_config(**GIDD)
    models = [gidd, gidd, gidd, model_config(**{**GIDD, "layers": 2})]
    found = on_ranks(1, _one_process, models, [0, 0, 1, 0])[0]
    return [joined([weights]) for weights in found]


def test_every_layout_starts_from_the_same_weights(alone):
    ranks = on_ranks(2, _all_layouts, model_config(**GIDD))
    for index, layout in enumerate(LAYOUTS):
        whole = joined([rank[index] for rank in ranks])
        assert whole.keys() == alone[0].keys(), layout
        for name, weight in whole.items():
            assert np.array_equal(weight, alone[0][name]), (layout, name)


def test_weights_follow_the_seed_and_the_name_alone(alone):
    first, again, other_seed, fewer_layers = alone
    matrices = [name for name, weight in first.items() if weight.any()]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other_seed[name]) for name in matrices)
    assert all(np.array_equal(first[name], weight) for name, weight in fewer_layers.items())
    drawn = {first[name].ravel()[:8].tobytes() for name in matrices}
    assert len(drawn) == len(matrices), "no two matrices share their draws"


def test_norm_offsets_biases_and_sinks_start_at_zero_and_matrices_do_not(alone):
    for name, weight in alone[0].items():
        is_zero = "norm" in name or name.endswith("bias") or "sink_" in name
        assert bool(weight.any()) != is_zero, name


OPTIONS = [
    {},
    {"qk_norm": "full"},
    {"qk_norm": "none", "sink": True},
    {"mlp_bias": True, "softcap": 30.0},
    {"ffn_multiple": 2, "heads": 2},
    GIDD,
    MODERN_BLOCK,
    {"kv_heads": 1, "qk_norm": "full", "sink": True, "mlp": "geglu", "mlp_bias": True},
    {"head_dim": 6, "mlp": "gelu", "qkv_bias": True},
]


def _count(models):
    return [sum(part.size for part, _, _ in weights_on_rank(model).values()) for model in models]


def test_the_built_model_has_the_parameters_its_closed_form_says(toy_corpus, tmp_path):
    models = [model_config(**option) for option in OPTIONS]
    built = on_ranks(1, _count, models)[0]
    for model, count in zip(models, built, strict=True):
        config = toy_config(toy_corpus, tmp_path).model_copy(update={"model": model})
        rows = model.padded_vocab_size(260)
        shape = config.shape(vocab_size=260)
        assert parameters(shape, vocab_entries=rows).total == count
        flat = {f"model.{key}": value for key, value in model.model_dump().items()}
        assert params_of(flat) == paper_parameters(shape)
        assert flops_per_token_of(flat, "deepseek") == flops_per_token(shape, "deepseek")
