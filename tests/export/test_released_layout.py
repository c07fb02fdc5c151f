"""Names, shapes, counts and keys against the released `dvruette/gidd-*` checkpoints, without any weights."""

from __future__ import annotations

import math

import pytest
import torch

from megadiff.config.load import load_config
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.export.released_config import config_of, model_from, model_keys, noise_from, read_released
from megadiff.export.weight_files import Planned, released_shapes, shards, training_tensors
from megadiff.run.config import RunConfig
from megadiff.run.recorded_parts import method_of
from tests.checkpoint.test_manifest import manifest
from tests.support.commands import REPOSITORY

VOCAB = 131072
SIZES = {"gidd-mask-3b": (18, 3072, 2_844_349_440), "gidd-unif-3b": (19, 3072, 2_957_629_440)}
SIZES["gidd-unif-10b"] = (34, 4608, 9_873_022_464)


def run_of(name):
    return load_config(REPOSITORY / f"examples/models/{name}.yaml", [], RunConfig)


def config_json(name, dtype="bfloat16"):
    described = manifest(config=run_of(name).model_dump(mode="json", by_alias=True), vocab_size=VOCAB, mask_id=3)
    tokenizer = ByteTokenizer()  # of which the ids 0 to 2 matter
    return config_of(
        described, tokenizer, method_of(described, tokenizer, where=REPOSITORY).export_config(), dtype=dtype
    )


def test_the_3b_model_has_the_269_tensors_of_the_released_file():
    d, heads, width = 3072, 24, 128
    block = {f"self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
    block |= {f"self_attn.{name}_norm.weight": (d,) for name in "qk"}
    block |= {f"self_attn.{name}_bias": (heads, width) for name in "kv"}
    block |= {"mlp.up_proj.weight": (4 * d, d), "mlp.up_proj.bias": (4 * d,)}
    block |= {"mlp.down_proj.weight": (d, 4 * d), "mlp.down_proj.bias": (d,)}
    block |= {"attn_layernorm.weight": (d,), "mlp_layernorm.weight": (d,)}
    wanted = {f"model.layers.{layer}.{name}": shape for layer in range(19) for name, shape in block.items()}
    wanted |= {"model.embed_tokens.weight": (VOCAB, d), "model.norm.weight": (d,), "lm_head.weight": (VOCAB, d)}
    found = released_shapes(run_of("gidd-unif-3b").model, vocab_size=VOCAB)
    assert len(block) == 14
    assert len(wanted) == 269
    assert found == wanted


@pytest.mark.parametrize("name", SIZES)
def test_the_shipped_class_has_just_these_tensors_on_the_meta_device(name):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    from megadiff.export.huggingface.configuration_gidd import GiddConfig
    from megadiff.export.huggingface.modeling_gidd import GiddForDiffusionLM

    config = {key: value for key, value in config_json(name).items() if key not in ("auto_map", "architectures")}
    with torch.device("meta"):
        model = GiddForDiffusionLM(GiddConfig(**config))
    found = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert found == released_shapes(run_of(name).model, vocab_size=VOCAB)
    assert sum(weight.numel() for weight in model.parameters()) == SIZES[name][2]


@pytest.mark.parametrize(("name", "files"), [("gidd-mask-3b", 2), ("gidd-unif-3b", 2), ("gidd-unif-10b", 4)])
def test_five_gigabyte_files_are_as_many_as_were_released(name, files):
    shapes = released_shapes(run_of(name).model, vocab_size=VOCAB)
    planned = [Planned(tensor, shape, torch.bfloat16) for tensor, shape in shapes.items()]
    assert len(shards(planned, max_bytes=5 * 10**9)) == files
    assert sum(math.prod(shape) for shape in shapes.values()) == SIZES[name][2]


def test_the_config_has_the_released_keys_and_values():
    """The published table of keys; what is ours beyond it says what such a file means by leaving it out."""
    released = {
        "model_type": "gidd",
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        "hidden_size": 3072,
        "num_hidden_layers": 19,
        "num_attention_heads": 24,
        "intermediate_size": 12288,
        "head_dim": 128,
        "resid_scale": 4.0,
        "head_scaling": 512 / 3072,
        "weight_scaling": 1.0,
        "init_scale": 0.4 / math.sqrt(3072),
        "emb_init_scale": 0.02,
        "head_init_scale": 0.0,
        "attn_soft_cap": 30.0,
        "rms_norm_eps": 1e-6,
        "use_qk_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "is_causal": False,
        "rope_theta": 10000,
        "rope_scaling": None,
        "noise_type": 1000.0,
        "min_log_snr": -9,
        "max_log_snr": 9,
        "attn_performer": "eager",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    found = config_json("gidd-unif-3b")
    assert {key: found[key] for key in released} == released
    said = {
        "qk_norm": "full",
        "noise_scale": 1.0,
        "prompt_attention": "block",
        "prepended_bos": False,
        "mask_token_id": 3,
        "pad_token_id": 2,
    }
    assert {key: found[key] for key in said} == said
    assert set(found) == {*released, *said, "auto_map", "architectures"}


@pytest.mark.parametrize("name", SIZES)
def test_a_released_config_gives_back_the_run_it_came_from(name):
    """From the published keys alone: every setting that bears on what is computed."""
    run = run_of(name)
    ours = {"qk_norm", "noise_scale", "prompt_attention", "prepended_bos"}
    config = {key: value for key, value in config_json(name).items() if key not in ours}
    keys = read_released(config, where="config.json")
    assert model_from(keys, where="config.json") == run.model
    assert noise_from(keys, where="config.json").shift_value == run.noise.shift_value


@pytest.mark.parametrize("layers", [1, 3, 7, 18, 19, 34, 49])
def test_a_residual_factor_survives_the_way_through_the_config(layers):
    model = run_of("gidd-unif-3b").model.model_copy(update={"layers": layers, "resid_scale": 0.3, "head_scale": 0.7})
    assert model_keys(model)["resid_scale"] / layers == 0.3
    keys = read_released({**model_keys(model), "vocab_size": VOCAB}, where="x")
    assert model_from(keys, where="x").resid_factor == 0.3


def test_every_part_of_a_fused_matrix_is_named_once():
    names = [name for tensor in training_tensors(run_of("l8-d512").model, vocab_size=VOCAB) for name in tensor.released]
    assert len(names) == len(set(names)) == 8 * 14 + 3
