"""Autoregressive checkpoints of Llama's naming: those that fit compute here what they do in transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from megadiff.errors import CheckpointError
from megadiff.export.importing import import_folder
from tests.export.runs import trainer_logits

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rope_theta": 5000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "relu2",
}


@pytest.fixture(params=[False, True], ids=["own head", "tied head"])
def arcee(request, tmp_path):
    """A drawn model with grouped key heads and gains away from 1, saved by transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    torch.manual_seed(0)
    config = transformers.ArceeConfig(**SIZES, tie_word_embeddings=request.param, initializer_range=0.3)
    model = transformers.ArceeForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path / "arcee")
    return model, tmp_path


def test_an_arcee_model_computes_the_same_here(arcee):
    model, root = arcee
    found = import_folder(root / "arcee", root / "out", tokenizer="byte")
    assert found.model.ffn_multiple == 3
    assert found.manifest.config["method"]["name"] == "next_token"
    ids = torch.randint(0, 260, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(ids).logits[..., :260]
    ours = trainer_logits(found.folder, [(16, ids)])[0]
    assert float(wanted.abs().max()) > 0.5
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def gated(tmp_path, **changes):
    config = {"model_type": "llama", **SIZES, "hidden_act": "silu", **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ["self_attn.q_proj.weight", "mlp.gate_proj.weight", "post_attention_layernorm.weight"]
    save_file({f"model.layers.0.{name}": torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    return tmp_path


def test_llama_itself_is_refused_for_its_gate(tmp_path):
    with pytest.raises(CheckpointError, match=r"\(llama\) cannot be a starting point: its MLP is gated .*; its act"):
        import_folder(gated(tmp_path), tmp_path / "out", tokenizer="byte")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_scaling": {"rope_type": "llama3"}}, r"rotary embeddings are scaled \(llama3\)"),
        ({"sliding_window": 8}, "its attention slides"),
        ({"head_dim": 16}, "its heads are 16 wide, not hidden_size / heads"),
        ({"intermediate_size": 100}, "its MLP width 100 is no multiple of its width 32"),
        ({"partial_rotary_factor": 0.5}, "turn a part of each head alone"),
        ({"hidden_size": None}, "its config.json has no hidden_size"),
    ],
)
def test_every_reason_is_named(tmp_path, changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        import_folder(gated(tmp_path, **changes), tmp_path / "out", tokenizer="byte")
