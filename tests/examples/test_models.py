"""The paper's eight sizes, a smaller one and three of Llama's block: parameters of description and built model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megadiff.config.load import load_config
from megadiff.model import cost
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from tests.support.ranks import on_ranks

with quiet():
    import torch

    from megadiff.model.denoiser import build_chunks
    from megadiff.parallel.config import Layout, ParallelConfig
    from megadiff.parallel.topology import open_topology
    from tests.support.runs import platform_on_rank

MODELS = Path(__file__).parents[2] / "examples" / "models"
PRESETS = MODELS.parent / "presets"

SIZES = {
    "l6-d384": (6, 384, 6, 10_649_472, 10_642_560, 111_305_856, "1.2052e+08"),
    "l8-d512": (8, 512, 8, 25_223_680, 25_211_392, 159_429_120, "2.5201e+08"),
    "l10-d640": (10, 640, 10, 49_242_240, 49_223_040, 216_995_200, "4.5274e+08"),
    "l12-d768": (12, 768, 12, 85_064_448, 85_036_800, 286_363_392, "7.3688e+08"),
    "l16-d1024": (16, 1024, 16, 201_556_992, 201_507_840, 469_943_296, "1.6120e+09"),
    "l20-d1536": (20, 1536, 12, 566_662_656, 566_570_496, 969_223_680, "4.1550e+09"),
    "gidd-mask-3b": (18, 3072, 24, 2_039_208_960, 2_039_043_072, 2_844_349_440, "1.3594e+10"),
    "gidd-unif-3b": (19, 3072, 24, 2_152_498_176, 2_152_323_072, 2_957_629_440, "1.4349e+10"),
    "gidd-unif-10b": (34, 4608, 36, 8_665_532_928, 8_665_062_912, 9_873_022_464, "5.5844e+10"),
}
"""Layers, width, heads; parameters as the paper counts them, as they are, with embedding and head; FLOPs a token."""

LLAMA = {
    # 12 (768^2 (2 + 2 / 3) + 3 x 768 x 2048) and gains of 25 norms; 32,768 rows, which are also the head
    "llama-100m": (75_516_672, 100_682_496),
    # 16 (2048^2 (2 + 2 / 4) + 3 x 2048 x 8192) and 33 norms; 131,072 rows, once
    "llama-1b": (973_146_112, 1_241_581_568),
    # 32 (4096^2 (2 + 2 / 4) + 3 x 4096 x 11008) and 65 norms; 131,072 rows, twice
    "llama-7b": (5_670_965_248, 6_744_707_072),
}
"""Parameters without embedding and head, and with them."""

GPUS = {"l16-d1024": 16, "l20-d1536": 32, "gidd-mask-3b": 64, "gidd-unif-3b": 64, "gidd-unif-10b": 128}
"""Where a file's comment names more than 8; every file must do on 8 and on 64 as well."""

H100_BYTES = 80e9


def size(name: str) -> RunConfig:
    return load_config(MODELS / f"{name}.yaml", [], RunConfig)


def vocabulary(config: RunConfig) -> int:
    assert config.data.vocab_size is not None
    return config.data.vocab_size


def test_every_file_is_one_of_the_sizes():
    assert {path.stem for path in MODELS.glob("*.yaml")} == {*SIZES, *LLAMA}


@pytest.mark.parametrize("name", LLAMA)
def test_a_model_of_llamas_block_has_the_parameters_counted_by_hand(name):
    config = size(name)
    counted = cost.parameters(config.shape(vocab_size=vocabulary(config)))
    assert (counted.non_embedding, counted.total) == LLAMA[name]
    assert (config.model.mlp, config.model.qk_norm, config.model.sink, config.name) == ("swiglu", "none", False, name)


@pytest.mark.parametrize("name", SIZES)
def test_the_run_description_counts_as_the_paper_does(name):
    layers, hidden, heads, p_paper, p_true, total, flops = SIZES[name]
    config = size(name)
    shape = config.shape(vocab_size=vocabulary(config))
    assert (shape.layers, shape.hidden, shape.heads, shape.seq_length) == (layers, hidden, heads, 2048)
    assert (config.name, vocabulary(config), config.model.padded_vocab_size(vocabulary(config))) == (name, 2**17, 2**17)
    assert cost.paper_parameters(shape) == p_paper
    assert cost.parameters(shape).non_embedding == p_true
    assert cost.parameters(shape).total == total
    assert f"{cost.flops_per_token(shape, 'deepseek'):.4e}" == flops


@pytest.fixture(scope="module")
def built():
    """`{(name, tensor ranks): parameters}` of the models that the files describe, all of them really built."""
    configs = {name: size(name) for name in SIZES}
    counted = {}
    for tensor in (1, 2):
        ranks = on_ranks(tensor, _count_on_rank, configs, tensor)
        counted.update({(name, tensor): sum(rank[name] for rank in ranks) for name in SIZES})
    return counted


def _count_on_rank(configs, tensor):
    """Distinct parameters this rank holds, by model; what every tensor rank holds alike counts on the first alone.

    On torch's meta device: every module and shape is the real one, no memory is taken, so the 10B model fits too.
    """
    meta = replace(platform_on_rank(), device=torch.device("meta"))
    topology = open_topology(Layout(tensor, 1, 1, 1, 1))
    counted = {}
    for name, config in configs.items():
        with quiet(), torch.device("meta"):
            chunks = build_chunks(
                config.model,
                vocab_size=vocabulary(config),
                parallel=ParallelConfig(tensor=tensor),
                precision=config.precision,
                platform=meta,
                topology=topology,
            )
        counted[name] = sum(
            parameter.numel()
            for chunk in chunks
            for parameter in chunk.parameters()
            if topology.tensor_rank == 0 or getattr(parameter, "tensor_model_parallel", False)
        )
    return counted


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", SIZES)
def test_the_model_has_the_papers_parameters_on_one_and_two_ranks(built, name, tensor):
    assert built[name, tensor] == SIZES[name][5]


@pytest.mark.parametrize("name", [*SIZES, *LLAMA])
def test_the_layout_fits_the_gpus_the_file_names_and_eight_and_sixty_four(name):
    config = size(name)
    for gpus in (8, 64, GPUS.get(name, 8)):
        layout = config.layout(world_size=gpus, vocab_size=vocabulary(config))
        memory = cost.bytes_per_rank(
            config.shape(vocab_size=vocabulary(config)),
            cost.Layout(
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                data=layout.data,
                sequence=config.parallel.sequence,
                micro_batch_size=config.batch.micro_batch_size,
                distributed_optimizer=config.parallel.distributed_optimizer,
            ),
            cost.Precision("bf16", "bf16", master_weights=True),
        )
        assert memory.total < 0.75 * H100_BYTES, gpus


@pytest.mark.parametrize("name", SIZES)
def test_batch_and_learning_rate_follow_the_papers_laws(name):
    config = size(name)
    batch_tokens, tokens = config.tokens_per_step, config.tokens_per_step * config.steps
    assert config.optimizer.lr == pytest.approx(10**-2.06 * batch_tokens**0.3412, rel=0.01)
    sizing = 10**-2.442 * tokens**0.8179 if name.startswith("gidd") else 10**-2.4 * tokens**0.8225
    assert sizing / 1.45 < batch_tokens < 1.45 * sizing


def test_the_presets_say_what_was_trained():
    config = load_config(PRESETS / "gidd.yaml", [*RUN, "optimizer.lr=0.3"], RunConfig)
    assert config.model.resid_factor == 4 / 18
    assert config.model.head_factor == 512 / 3072
    assert (config.conditioning.per_token_noise, config.conditioning.prompt, config.conditioning.pad_insertion) == (
        0.2,
        0.2,
        0.0,
    )
    assert (config.objective.reduction, config.objective.weighting) == ("sum", "surrogate")
    assert (config.optimizer.name, config.optimizer.clip_grad, config.optimizer.eps) == ("laprop", 0, 1e-8)
    assert config.precision.master_weights
    bare = load_config(PRESETS / "gidd_bf16_weights.yaml", [*RUN, "optimizer.lr=0.3"], RunConfig)
    assert not bare.precision.master_weights
    assert bare.model == config.model
    assert bare.optimizer == config.optimizer


RUN = (
    "name=preset",
    "model.layers=18",
    "model.hidden=3072",
    "model.heads=24",
    "model.seq_length=2048",
    "data.train=[data/train]",
    "data.tokenizer=byte",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=1",
    "schedule.steps=4000",
)
"""What a preset leaves to its user."""
