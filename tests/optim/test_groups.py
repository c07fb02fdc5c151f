"""CompleteP's table of groups, over the parameters of a model that is really built."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megadiff.model.config import ModelConfig
from megadiff.optim.config import Scale, effective_eps
from megadiff.optim.members import laprop
from megadiff.optim.pieces import parameter_groups
from megadiff.platform.quiet import quiet
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK

with quiet():
    import torch

    from megadiff.model.config import PrecisionConfig
    from megadiff.model.denoiser import build_chunks
    from megadiff.model.initialisation import initialise, role_of
    from megadiff.parallel.config import Layout, ParallelConfig
    from megadiff.parallel.topology import open_topology
    from tests.support.runs import platform_on_rank

HIDDEN, LAYERS, ETA, DECAY = 256, 3, 0.3, 0.1
SETTINGS = laprop.Settings(
    name="laprop", lr=ETA, eps=1e-8, weight_decay=DECAY, parametrisation="completep", eps_calibration="sum"
)

SCALE = Scale(hidden=HIDDEN, layers=LAYERS, tokens_per_step=131_072, reduction="sum")

TABLE = {
    # role: first standard deviation, learning rate, decay
    "norm": (0.0, 0.02 * ETA, 0.0),
    "embedding": (0.02, 0.02 * ETA, 0.0),
    "bias": (0.0, 0.02 * ETA, 0.0),
    "head": (0.0, 0.02 * ETA, 0.0),
    "hidden": (0.4 / HIDDEN**0.5, ETA / HIDDEN, DECAY * HIDDEN),
}

ROLES = {
    "embedding.word_embeddings.weight": "embedding",
    "decoder.layers.0.input_layernorm.weight": "norm",
    "decoder.layers.0.self_attention.core_attention.sink_key": "bias",
    "decoder.layers.0.self_attention.core_attention.sink_value": "bias",
    "decoder.layers.0.self_attention.linear_proj.weight": "hidden",
    "decoder.layers.0.self_attention.linear_qkv.weight": "hidden",
    "decoder.layers.0.self_attention.q_layernorm.weight": "norm",
    "decoder.layers.0.self_attention.k_layernorm.weight": "norm",
    "decoder.layers.0.pre_mlp_layernorm.weight": "norm",
    "decoder.layers.0.mlp.linear_fc1.weight": "hidden",
    "decoder.layers.0.mlp.linear_fc1.bias": "bias",
    "decoder.layers.0.mlp.linear_fc2.weight": "hidden",
    "decoder.layers.0.mlp.linear_fc2.bias": "bias",
    "decoder.final_layernorm.weight": "norm",
    "output_layer.weight": "head",
}
"""Every parameter outside the second and later blocks, which repeat the first."""


@pytest.fixture(scope="module")
def weights():
    """`{name: weight}` of the paper's block at 3 layers of width 256."""
    return on_ranks(1, _weights_on_rank)[0]


def _weights_on_rank():
    platform, topology = platform_on_rank(), open_topology(Layout(1, 1, 1, 1, 1))
    model = ModelConfig(layers=LAYERS, hidden=HIDDEN, heads=4, seq_length=16, **GIDD_BLOCK)
    with quiet():
        chunks = build_chunks(
            model,
            vocab_size=260,
            parallel=ParallelConfig(),
            precision=PrecisionConfig(compute="fp32"),
            platform=platform,
            topology=topology,
        )
    initialise(chunks, model, seed=0, topology=topology)
    return {name: parameter.detach().numpy() for chunk in chunks for name, parameter in chunk.named_parameters()}


def test_every_parameter_of_the_model_has_the_tables_role(weights):
    one_block = {name: role_of(name) for name in weights if "layers." not in name or "layers.0." in name}
    assert one_block == ROLES
    assert len(weights) == 14 * LAYERS + 3 - 2 * LAYERS  # q, k and v are one matrix here, three in the paper's count


def test_first_weights_have_the_tables_spread(weights):
    for name, weight in weights.items():
        std = TABLE[role_of(name)][0]
        assert weight.std() == pytest.approx(std, rel=0.02), name
        assert abs(weight.mean()) <= 4 * std / weight.size**0.5, name


def test_every_parameter_gets_the_tables_rate_decay_and_epsilon(weights):
    parameters = {name: torch.nn.Parameter(torch.from_numpy(weight)) for name, weight in weights.items()}
    groups = parameter_groups([(role_of(name), parameter) for name, parameter in parameters.items()], SETTINGS, SCALE)
    names = {id(parameter): name for name, parameter in parameters.items()}
    seen = {names[id(p)]: group for group in groups for p in group["params"]}
    assert sorted(seen) == sorted(parameters)
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    for name, group in seen.items():
        _, rate, decay = TABLE[role_of(name)]
        assert (group["lr"], group["weight_decay"]) == pytest.approx((rate, decay)), name
        assert group["eps"] == pytest.approx(1e-8 / (HIDDEN * LAYERS)), name
        assert ETA * group["lr_mult"] == pytest.approx(rate), name


@pytest.mark.parametrize(("hidden", "layers"), [(128, 2), (512, 8), (4608, 34)])
def test_epsilon_falls_with_width_and_depth_and_rate_times_decay_does_not(hidden, layers):
    scale = replace(SCALE, hidden=hidden, layers=layers)
    bulk = parameter_groups([("hidden", torch.nn.Parameter(torch.zeros(1)))], SETTINGS, scale)[0]
    assert bulk["params"]
    assert bulk["eps"] == pytest.approx(1e-8 / (hidden * layers), rel=1e-12)
    assert bulk["lr"] == pytest.approx(ETA / hidden, rel=1e-12)
    assert bulk["lr"] * bulk["weight_decay"] == pytest.approx(ETA * DECAY, rel=1e-12)


def test_epsilon_follows_the_loss_from_the_reduction_it_was_tuned_for():
    """A mean loss has gradients smaller by the tokens of a step; without a calibration eps stays as it is."""
    tuned = effective_eps(SETTINGS, SCALE)
    assert effective_eps(SETTINGS, replace(SCALE, reduction="mean")) == pytest.approx(tuned / 131_072, rel=1e-12)
    loose = SETTINGS.model_copy(update={"eps_calibration": None})
    assert effective_eps(loose, replace(SCALE, reduction="mean")) == tuned


def test_the_standard_parametrisation_scales_nothing():
    settings = SETTINGS.model_copy(update={"parametrisation": "standard"})
    groups = parameter_groups([(role, torch.nn.Parameter(torch.zeros(1))) for role in TABLE], settings, SCALE)
    assert {group["lr"] for group in groups} == {ETA}
    assert {group["eps"] for group in groups} == {1e-8} == {effective_eps(settings, SCALE)}
    assert {group["weight_decay"] for group in groups} == {0.0, DECAY}
