"""Settings of a model's implementation: how they reach megatron-core, and which contradict each other."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megadiff.errors import ConfigError
from megadiff.model import config
from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.model.denoiser import (
    modules_for,
    transformer_config,
)
from megadiff.model.layers import ColumnLinear, DirectLayer
from megadiff.parallel.config import ParallelConfig
from megadiff.platform.machine import detect
from tests.support.runs import toy_config

BF16 = PrecisionConfig()
FP32 = PrecisionConfig(compute="fp32")
CPU = detect("cpu")
MODEL = ModelConfig(layers=8, hidden=256, heads=4, seq_length=128)


def test_layers_on_a_cpu_are_local():
    assert modules_for(ParallelConfig(), BF16, CPU).column is ColumnLinear


def test_parts_of_a_layer_are_recomputed_by_megatrons_own_layer():
    assert modules_for(ParallelConfig(recompute="selective"), BF16, CPU).layer is DirectLayer.__base__
    assert modules_for(ParallelConfig(recompute="full"), BF16, CPU).layer is DirectLayer


@pytest.mark.parametrize(("recipe", "form"), [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3")])
def test_a_recipe_becomes_megatrons_settings(recipe, form):
    ends = 0 if recipe == "delayed" else 2
    precision = PrecisionConfig(fp8=recipe, fp8_first_last_bf16=ends)
    settings = transformer_config(MODEL, parallel=ParallelConfig(), precision=precision, platform=CPU)
    assert (settings.fp8, settings.fp8_recipe, settings.fp8_param) == (form, recipe, False)
    assert settings.first_last_layers_bf16 == (ends > 0)
    assert (settings.num_layers_at_start_in_bf16, settings.num_layers_at_end_in_bf16) == (ends, ends)
    assert (settings.fp8_amax_history_len, settings.fp8_amax_compute_algo) == (1024, "max")


def test_without_fp8_megatron_hears_of_none():
    assert config.megatron_settings(BF16) == {}
    settings = transformer_config(MODEL, parallel=ParallelConfig(), precision=BF16, platform=CPU)
    assert settings.fp8 is None
    assert settings.recompute_granularity is None
    assert not settings.gradient_accumulation_fusion
    assert not settings.apply_rope_fusion
    assert not settings.tp_comm_overlap


@pytest.mark.parametrize(
    ("wanted", "granularity", "method", "layers", "modules"),
    [
        ({"recompute": "full"}, "full", "block", 4, ["core_attn"]),
        ({"recompute": "full", "recompute_layers": 3}, "full", "block", 3, ["core_attn"]),
        ({"recompute": "selective"}, "selective", None, None, ["mlp"]),
        ({"recompute": "selective", "recompute_modules": ["layernorm"]}, "selective", None, None, ["layernorm"]),
    ],
)
def test_recomputation_becomes_megatrons_settings(wanted, granularity, method, layers, modules):
    """Eight blocks on two stages; `core_attn` is what the library fills in and full recomputation does not read."""
    parallel = ParallelConfig.model_validate({"pipeline": 2, **wanted})
    settings = transformer_config(MODEL, parallel=parallel, precision=FP32, platform=CPU)
    assert (settings.recompute_granularity, settings.recompute_method) == (granularity, method)
    assert (settings.recompute_num_layers, settings.recompute_modules) == (layers, modules)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"recompute_modules": ["mlp"]},
            r"recompute_modules goes with parallel.recompute=selective only \(found none\)",
        ),
        ({"recompute": "selective", "recompute_layers": 2}, r"recompute_layers goes with parallel.recompute=full only"),
    ],
)
def test_recompute_keys_that_would_do_nothing_are_refused(tree, message):
    with pytest.raises(ValidationError, match=message):
        ParallelConfig.model_validate(tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"compute": "fp32", "fp8": "delayed"}, r"precision.fp8=delayed needs precision.compute=bf16 \(found fp32\)"),
        ({"fp8_first_last_bf16": 1}, r"goes with fp8=tensorwise or blockwise only \(found none\)"),
        ({"fp8": "delayed", "fp8_first_last_bf16": 1}, r"goes with fp8=tensorwise or blockwise only \(found delayed\)"),
    ],
)
def test_fp8_that_cannot_be_is_refused(tree, message):
    with pytest.raises(ValidationError, match=message):
        PrecisionConfig.model_validate(tree)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"transformer_impl": "transformer_engine"},
            r"transformer_impl=transformer_engine needs .* found platform=cpu and precision.comp",
        ),
        (
            {
                "transformer_impl": "local",
                "platform": "auto",
                "precision__compute": "bf16",
                "precision__fp8": "tensorwise",
            },
            r"precision.fp8=tensorwise needs Transformer Engine's layers, .* found transformer_impl=local",
        ),
        (
            {
                "platform": "auto",
                "precision__compute": "bf16",
                "precision__fp8": "delayed",
                "parallel__recompute": "selective",
                "parallel__recompute_modules": ["layernorm"],
            },
            r"has layernorm, which precision.fp8=delayed cannot recompute",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, keys, message):
    with pytest.raises(ValidationError, match=message):
        toy_config(tmp_path / "none", tmp_path, **keys)


@pytest.mark.parametrize(
    ("model", "parallel", "recipe", "micro", "message"),
    [
        (
            {"hidden": 40, "heads": 4},
            {},
            "delayed",
            1,
            r"^precision.fp8=delayed needs model.hidden to be a multiple of 16, found 40; 32 or 48 would do$",
        ),
        (
            {"hidden": 96, "heads": 4},
            {"tensor": 4},
            "tensorwise",
            1,
            r"model.hidden / parallel.tensor .* found 24; 16 or 32",
        ),
        (
            {"seq_length": 20},
            {},
            "tensorwise",
            3,
            r"batch.micro_batch_size x model.seq_length .* 16, found 60; 48 or 64",
        ),
        (
            {"seq_length": 32},
            {"tensor": 4, "sequence": True},
            "delayed",
            1,
            r"x model.seq_length / parallel.tensor to be a multiple of 16, found 8; 16 would do",
        ),
        (
            {"seq_length": 128},
            {"tensor": 2, "sequence": True},
            "blockwise",
            1,
            r"multiple of 128, found 64; 128 would do",
        ),
    ],
)
def test_shapes_fp8_cannot_multiply_are_refused_with_what_would_do(model, parallel, recipe, micro, message):
    shape = ModelConfig.model_validate({**MODEL.model_dump(), **model})
    with pytest.raises(ConfigError, match=message):
        config.check_shapes(
            PrecisionConfig(fp8=recipe), shape, ParallelConfig.model_validate(parallel), micro_batch_size=micro
        )


def test_shapes_fp8_can_multiply_pass_and_without_fp8_all_do():
    odd = ModelConfig(layers=2, hidden=20, heads=2, seq_length=7)
    config.check_shapes(BF16, odd, ParallelConfig(), micro_batch_size=1)
    for recipe in ("delayed", "tensorwise", "blockwise"):
        layout = ParallelConfig(tensor=2, sequence=True)
        config.check_shapes(PrecisionConfig(fp8=recipe), MODEL, layout, micro_batch_size=2)


def test_more_bf16_blocks_at_an_end_than_a_stage_has_are_refused():
    precision = PrecisionConfig(fp8="tensorwise", fp8_first_last_bf16=3)
    with pytest.raises(ConfigError, match=r"fp8_first_last_bf16 is 3, but a pipeline stage has 2 blocks"):
        config.check_shapes(precision, MODEL, ParallelConfig(pipeline=4), micro_batch_size=1)


def test_a_run_checks_its_fp8_shapes_with_its_layout(tmp_path):
    """Before any process group, and by `--check` on a machine without GPU."""
    keys = {"platform": "auto", "precision__compute": "bf16", "precision__fp8": "tensorwise", "model__hidden": 40}
    config = toy_config(tmp_path / "none", tmp_path, **keys)
    with pytest.raises(ConfigError, match=r"model.hidden to be a multiple of 16, found 40"):
        config.layout(world_size=1, vocab_size=260)
