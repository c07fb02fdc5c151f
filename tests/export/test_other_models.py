"""What the released checkpoints are not: other norms, no sink, no cap, causal prompts, time noise, next tokens."""

from __future__ import annotations

import json

import pytest
import torch

from megadiff.checkpoint.manifest import read_manifest
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.processes.gidd_time import GiddTime
from megadiff.errors import ConfigError
from megadiff.export.export import export
from megadiff.export.importing import import_folder
from tests.export.runs import sequences_with_prompts, trained, trainer_logits
from tests.support.runs import MODERN_BLOCK

PLAIN = {"qk_norm": "head", "sink": False, "softcap": None, "resid_scale": 0.7, "head_scale": 1.0, "mlp_bias": False}
MODERN = {f"model__{key}": value for key, value in {**PLAIN, **MODERN_BLOCK}.items()}
FOUR_RANKS = {"tensor": 2, "pipeline": 2, "sequence": True}
MODELS = {
    "plain block, causal prompts, time noise": {
        **{f"model__{key}": value for key, value in PLAIN.items()},
        "conditioning__prompt_attention": "causal",
        "noise": {"process": "gidd_time", "p_uniform": 0.2},
    },
    "no norms of queries, sink without cap": {
        "model__qk_norm": "none",
        "model__softcap": None,
        "conditioning__prompt": 0,
    },
    "the modern block, causal prompts": {**MODERN, "conditioning__prompt_attention": "causal", "parallel": FOUR_RANKS},
    "shared keys with sinks and a cap, gated gelu": {
        "model__kv_heads": 2,
        "model__mlp": "geglu",
        "model__rope_scaling": {"type": "linear", "factor": 2.0},
        "conditioning__prompt": 0,
    },
    "shifted outputs, causal prompts": {
        **MODERN,
        "model__alignment": "shifted",
        "conditioning__prompt_attention": "causal",
        "method": {"name": "adaptation", "anneal_steps": 2, "next_token_fraction": 0.3},
        "parallel": FOUR_RANKS,
    },
    "shifted outputs, prompts that see themselves": {"model__alignment": "shifted"},
    "autoregressive control": {"method__name": "next_token", "conditioning__prompt": 0},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, toy_corpus, tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    root = tmp_path_factory.mktemp("other")
    settings = MODELS[request.param]
    checkpoint = trained(toy_corpus, root, 4 if "parallel" in settings else 1, **settings)
    folder = export(checkpoint, root / "out").folder
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return request.param, checkpoint, folder, loaded.eval()


def test_its_logits_are_the_trainers(model):
    name, checkpoint, folder, loaded = model
    rows = sequences_with_prompts()
    if "prompts" not in name:
        rows = rows[:1]
    with torch.no_grad():
        found = [loaded(ids, prompt_lengths=torch.full((len(ids),), prompt)).logits for prompt, ids in rows]
    for ours, theirs in zip(trainer_logits(checkpoint, rows), found, strict=True):
        assert float(ours.abs().max()) > 0.05
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    attention = "block" if "see themselves" in name else "full"
    assert config["prompt_attention"] == ("causal" if "causal" in name else attention)
    assert config.get("alignment", "same") == ("shifted" if "shifted" in name else "same")


def test_an_import_of_it_exports_the_same_weights(model, tmp_path):
    _, checkpoint, folder, _ = model
    found = import_folder(folder, tmp_path / "in")
    again = export(found.folder, tmp_path / "out").folder
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert found.manifest.config["method"] == read_manifest(checkpoint).config["method"]


LLAMA = {key: value for key, value in MODERN.items() if "bias" not in key} | {"model__rope_scaling": None}
"""The modern block with what Llama has of it."""


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_control_trained_on_four_ranks_is_a_plain_llama(toy_corpus, tmp_path, compute):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    settings = {**LLAMA, "model__resid_scale": 1.0, "model__qk_norm": "none", "method__name": "next_token"}
    settings |= {"conditioning__prompt": 0, "precision__compute": compute, "parallel": FOUR_RANKS}
    checkpoint = trained(toy_corpus, tmp_path, 4, **settings)
    folder = export(checkpoint, tmp_path / "out", architecture="llama", dtype="fp32").folder
    assert not list(folder.glob("*.py"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(loaded).__name__ == "LlamaForCausalLM"
    rows = sequences_with_prompts()[:1]
    with torch.no_grad():
        found = loaded(rows[0][1]).logits
    if compute == "fp32":
        torch.testing.assert_close(found, trainer_logits(checkpoint, rows)[0], rtol=0, atol=1e-5)
    assert float(found.abs().max()) > 0.05


def test_null_means_as_many_heads_of_keys_as_of_queries():
    pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    from megadiff.export.huggingface.configuration_gidd import GiddConfig

    assert GiddConfig(num_attention_heads=8, num_key_value_heads=None).num_key_value_heads == 8
    assert GiddConfig(num_attention_heads=8, num_key_value_heads=2).num_key_value_heads == 2


def test_what_an_architecture_lacks_is_named(toy_corpus, tmp_path):
    checkpoint = trained(toy_corpus, tmp_path, 1)
    with pytest.raises(ConfigError, match=r"stored as llama: .*trained with method.name=gidd, not next_token"):
        export(checkpoint, tmp_path / "out", architecture="llama")
    with pytest.raises(
        ConfigError,
        match=r"cannot be stored as llada: model.mlp is relu2, it has swiglu; model.qk_norm is full, it has none; "
        r"model.sink is true; model.softcap is set; .* biases are mlp, it has none; .* prompts attend as block, not",
    ):
        export(checkpoint, tmp_path / "out", architecture="llada")


def test_a_diffusion_layout_takes_neither_other_noise_nor_other_heads(toy_corpus, tmp_path):
    settings = {**LLAMA, "model__resid_scale": 1.0, "model__qk_norm": "none", "conditioning__prompt": 0}
    checkpoint = trained(toy_corpus, tmp_path, 1, **settings, noise__shift="balanced")
    reasons = "its heads are model.hidden / model.heads wide, not 12 .*; its noise is masked, and the model's is not"
    with pytest.raises(ConfigError, match=reasons):
        export(checkpoint, tmp_path / "out", architecture="llada")


def test_it_generates_alike_with_and_without_cache_or_says_why_not(model):
    name, _, _, loaded = model
    options = {"max_new_tokens": 6, "max_denoising_steps": 6, "block_length": 3, "eos_token_id": None}
    prompt = torch.tensor([[0, 9, 10, 11]])
    if "autoregressive" in name:
        with pytest.raises(ValueError, match="predicts next tokens and cannot denoise"):
            loaded.generate(prompt, **options)
        return
    cached, plain = (loaded.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    assert not (cached == 3).any()


@pytest.mark.parametrize(("p_uniform", "gamma"), [(0.1, 1.0), (0.5, 2.0), (0.9, 0.5)])
def test_time_noise_is_found_again_from_its_levels(p_uniform, gamma):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    from megadiff.export.huggingface.generation_gidd import TimeNoise

    ours, shipped = NoiseProcess(260, 3, GiddTime(p_uniform, gamma)), TimeNoise(260, 3, p_uniform, gamma)
    levels = torch.linspace(-12, 12, 49, dtype=torch.float64)
    torch.testing.assert_close(shipped.uniform_prob(levels), ours.uniform_prob(levels), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(shipped.mask_prob(levels), ours.mask_prob(levels), rtol=1e-9, atol=1e-12)
