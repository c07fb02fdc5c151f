"""Public models, made by transformers' own classes with drawn weights, compute here what they do there."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadiff.data.tokenizers import load_tokenizer
from megadiff.errors import CheckpointError, ConfigError
from megadiff.export.export import export
from megadiff.export.importing import import_folder
from megadiff.parallel.config import Layout
from tests.export.runs import layout_logits, trainer_logits
from tests.fixtures.tokenizers.shapes import qwen

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
    "pad_token_id": 2,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 2.0}
MODELS = {
    "arcee": ("Arcee", {"hidden_act": "relu2"}),
    "arcee, tied": ("Arcee", {"hidden_act": "relu2", "tie_word_embeddings": True}),
    "llama": ("Llama", {}),
    "llama 3": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0, "intermediate_size": 90}),
    "llama, biases, linear": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen 2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen 3": ("Qwen3", {"head_dim": 12, "rope_scaling": YARN, "rope_theta": 100.0}),
    "qwen 3, biases": ("Qwen3", {"head_dim": 8, "attention_bias": True, "num_key_value_heads": 1}),
}


def drawn(kind, folder, **keys):
    """A model of transformers with gains away from 1 and biases away from 0, saved by transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **deepcopy(keys)})  # it adds to them
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            weight.data.normal_(0.0, 0.5)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_public_model_computes_the_same_here(name, tmp_path):
    kind, keys = MODELS[name]
    model = drawn(kind, tmp_path / "public", **keys)
    found = import_folder(tmp_path / "public", tmp_path / "out", tokenizer="byte")
    assert found.manifest.config["method"]["name"] == "next_token"
    ids = torch.randint(0, 260, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(ids).logits[..., :260]
    ours = trainer_logits(found.folder, [(16, ids)])[0]
    assert float(wanted.abs().max()) > 0.5
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    for layout in (Layout(2, 1, 1, 1, 1), Layout(1, 2, 1, 1, 1), Layout(2, 2, 1, 1, 1)):
        if layout.tensor <= (model.config.num_key_value_heads or layout.tensor):
            ours = layout_logits(found.folder, ids, layout)
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


ARCHITECTURES = {"Arcee": "arcee", "Llama": "llama", "Mistral": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_comes_in_goes_out_bit_for_bit(name, dtype, tmp_path):
    """The export has the layout of its architecture, and transformers loads it without code of the folder."""
    kind, keys = MODELS[name]
    model = drawn(kind, tmp_path / "public", **{**keys, "vocab_size": 260}).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "public")
    found = import_folder(tmp_path / "public", tmp_path / "in", tokenizer="byte")
    folder = export(found.folder, tmp_path / "out", architecture=ARCHITECTURES[kind]).folder
    stored, back = load_file(tmp_path / "public/model.safetensors"), load_file(folder / "model.safetensors")
    assert stored.keys() == back.keys()
    assert all(weight.dtype == back[key].dtype and torch.equal(weight, back[key]) for key, weight in stored.items())
    before, after = (type(model).from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "public", folder))
    ids = torch.randint(0, 260, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(after(ids).logits, before(ids).logits)
    again = import_folder(folder, tmp_path / "again", tokenizer="byte")
    assert again.model == found.model


def test_the_tables_are_cut_to_the_tokenizers_ids(tmp_path):
    model = drawn("Llama", tmp_path / "public")
    found = import_folder(tmp_path / "public", tmp_path / "in", tokenizer="byte")
    folder = export(found.folder, tmp_path / "out", architecture="llama").folder
    back = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(back, model.lm_head.weight[:260])
    drawn("Llama", tmp_path / "large", vocab_size=400)
    with pytest.raises(CheckpointError, match="the tokenizer byte has 260 ids, the embedding 400 rows; give the mod"):
        import_folder(tmp_path / "large", tmp_path / "none", tokenizer="byte")


@pytest.mark.parametrize("row", [None, "mean", 42])
@pytest.mark.parametrize("extra", [-1, 5], ids=["tables end before the mask", "the mask has a row"])
def test_the_row_of_a_mask_that_the_model_lacked(extra, row, tmp_path):
    tokenizer = load_tokenizer(str(qwen(tmp_path / "tokenizer")))
    mask, rows = tokenizer.mask_id, tokenizer.vocab_size + extra
    assert mask == tokenizer.vocab_size - 1, "its vocabulary has no mask, so it gets the next id"
    model = drawn("Qwen2", tmp_path / "public", vocab_size=rows)
    found = import_folder(tmp_path / "public", tmp_path / "in", tokenizer=str(tmp_path / "tokenizer"), mask_row=row)
    back = load_file(export(found.folder, tmp_path / "out", architecture="qwen2").folder / "model.safetensors")
    for name, table in {"model.embed_tokens": model.model.embed_tokens, "lm_head": model.lm_head}.items():
        ours, theirs = back[f"{name}.weight"], table.weight.detach()
        assert torch.equal(ours[:mask], theirs[:mask])
        is_stored = row is None and rows > mask
        wanted = theirs[42] if row == 42 else theirs[mask] if is_stored else theirs.mean(0)
        torch.testing.assert_close(ours[mask], wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigError, match=f"--mask-row {mask + 1}: wanted `mean` or an id from 0 to {mask:,}"):
        import_folder(tmp_path / "public", tmp_path / "no", tokenizer=str(tmp_path / "tokenizer"), mask_row=mask + 1)


@pytest.mark.parametrize(
    ("kind", "left_out", "reason"),
    [
        ("Qwen2", ".bias", "biases are none, it has qkv"),
        ("Qwen3", "_norm.weight", "model.qk_norm is none, it has head"),
    ],
)
def test_weights_that_an_architecture_has_must_be_there(tmp_path, kind, left_out, reason):
    drawn(kind, tmp_path / "public", head_dim=8)
    file = tmp_path / "public/model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if not (left_out in name and "self_attn" in name)}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"its weights are of another architecture: {reason}"):
        import_folder(tmp_path / "public", tmp_path / "in", tokenizer="byte")


def edited(folder, **changes):
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "layer_types"}
    path.write_text(json.dumps({**config, **changes}))
    return folder


def test_the_base_of_transformers_5_wins_and_yarn_needs_one(tmp_path):
    drawn("Llama", tmp_path / "public")
    folder = edited(tmp_path / "public", rope_theta=7.0, rope_parameters={"rope_theta": 5e5})
    assert import_folder(folder, tmp_path / "in", tokenizer="byte").model.rope_base == 5e5
    for changes, reason in [
        ({"rope_theta": 1.0, "rope_parameters": YARN}, "yarn needs model.rope_base above 1"),
        ({"rope_parameters": {**YARN, "factor": 1e30}}, "factor must be less than or equal to 1048576"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            import_folder(edited(folder, **changes), tmp_path / "none", tokenizer="byte")


def test_qwens_window_needs_its_switch(tmp_path):
    drawn("Qwen2", tmp_path / "public")
    folder = edited(tmp_path / "public", sliding_window=8, use_sliding_window=False)
    import_folder(folder, tmp_path / "in", tokenizer="byte")
    with pytest.raises(CheckpointError, match="its attention slides"):
        import_folder(edited(folder, use_sliding_window=True), tmp_path / "none", tokenizer="byte")


def llama(tmp_path, **changes):
    config = {"model_type": "llama", **SIZES, "hidden_act": "silu", **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ["self_attn.q_proj.weight", "mlp.gate_proj.weight", "post_attention_layernorm.weight"]
    save_file({f"model.layers.0.{name}": torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"rotary embeddings are scaled \(dynamic\)"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, "the key rope_scaling.mscale_all_dim is unknown"),
        ({"rope_parameters": {"full_attention": YARN}}, "the key rope_parameters.full_attention is unknown"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "turn a part of each head alone"),
        ({"rope_scaling": {**YARN, "factor": "4"}}, "rope_scaling.factor must be a number, found '4'"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 10**40}}, "max_position_embeddings"),
        ({"sliding_window": 8}, "its attention slides"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "activation is gelu_pytorch_tanh with a gate, wanted the one of swiglu"),
        ({"partial_rotary_factor": 0.5}, "turn a part of each head alone"),
        ({"num_key_value_heads": 3}, "its 3 key heads do not divide its 4 heads"),
        ({"no_rope_layers": [1, 0]}, "some of its layers have no rotary embeddings"),
        ({"hidden_size": None}, "its config.json has no hidden_size"),
        ({"model_type": "granite"}, r"\(granite\) cannot be a starting point: models are read of the kinds llama, "),
        ({"model_type": None}, r"\(no model_type\) cannot be a starting point"),
        ({"num_hidden_layers": 1}, r"requires model.embed_tokens.weight of shape \(2, 32\), which is missing"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, but the weight files beside it hold 1 layers"),
    ],
)
def test_every_reason_is_named(tmp_path, changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        import_folder(llama(tmp_path, **changes), tmp_path / "out", tokenizer="byte")
