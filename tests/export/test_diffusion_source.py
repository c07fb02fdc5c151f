"""Folders in the layouts of LLaDA, SDAR and Dream, against their blocks written here on plain tensors."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import CheckpointError
from megadiff.export.export import export
from megadiff.export.importing import import_folder
from megadiff.parallel.config import Layout
from tests.export.runs import layout_logits, trainer_logits
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, train_on_rank

LAYERS, WIDTH, HEADS, ROWS, THETA, EPS = 2, 32, 4, 260, 500.0, 1e-5
LLADA = {
    "model_type": "llada", "d_model": WIDTH, "n_heads": HEADS, "n_kv_heads": HEADS, "n_layers": LAYERS,
    "mlp_hidden_size": 48, "max_sequence_length": 16, "activation_type": "silu", "block_type": "llama",
    "layer_norm_type": "rms", "rms_norm_eps": EPS, "rope": True, "rope_theta": THETA, "weight_tying": False,
    "vocab_size": ROWS, "embedding_size": ROWS, "alibi": False, "include_bias": False, "include_qkv_bias": False,
    "mask_token_id": ByteTokenizer().mask_id,
}  # fmt: skip
SDAR = {
    "model_type": "sdar", "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 12,
    "num_hidden_layers": LAYERS, "intermediate_size": 48, "max_position_embeddings": 16, "hidden_act": "silu",
    "rms_norm_eps": EPS, "rope_theta": THETA, "tie_word_embeddings": False, "vocab_size": ROWS,
}  # fmt: skip
DREAM = {
    "model_type": "Dream", "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS, "intermediate_size": 48, "max_position_embeddings": 16, "hidden_act": "silu",
    "rms_norm_eps": EPS, "rope_theta": THETA, "tie_word_embeddings": False, "vocab_size": ROWS, "rope_scaling": None,
    "architectures": ["DreamModel"], "mask_token_id": ByteTokenizer().mask_id,
}  # fmt: skip
CONFIGS = {"llada": LLADA, "sdar": SDAR, "dream": DREAM}
HEAD = {"llada": WIDTH // HEADS, "sdar": 12, "dream": WIDTH // HEADS}
BLOCK = {
    "llada": ("model.transformer.blocks.{}.", "attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm",
              "ff_proj", "up_proj", "ff_out"),
    "sdar": ("model.layers.{}.", "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
             "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}  # fmt: skip
TABLES = {
    "llada": ("model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"),
    "sdar": ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
}
BLOCK["dream"], TABLES["dream"] = BLOCK["sdar"], TABLES["sdar"]


def rms(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain


def rotated(x):
    """Rotate [B, L, H, D] by position, halves paired."""
    width = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[1]).double(), THETA ** (-torch.arange(0, width, 2).double() / width))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def published_logits(kind, weights, ids):
    """Logits [B, L, V] in float64, every position seeing every other."""
    weights = {name: weight.double() for name, weight in weights.items()}
    embedding, last_norm, head = (weights[name] for name in TABLES[kind])
    x = embedding[ids]
    for layer in range(LAYERS):
        prefix, *names = BLOCK[kind]
        norm, q, k, v, out, mlp_norm, gate, up, down = (weights[f"{prefix.format(layer)}{n}.weight"] for n in names)
        h = rms(x, norm)
        width = HEAD[kind]
        projected = [h @ one.T for one in (q, k, v)]
        if kind == "dream":
            biases = [weights[f"{prefix.format(layer)}self_attn.{one}_proj.bias"] for one in "qkv"]
            projected = [one + bias for one, bias in zip(projected, biases, strict=True)]
        queries, keys, values = (one.unflatten(-1, (-1, width)) for one in projected)
        if kind == "sdar":
            queries = rms(queries, weights[f"{prefix.format(layer)}self_attn.q_norm.weight"])
            keys = rms(keys, weights[f"{prefix.format(layer)}self_attn.k_norm.weight"])
        queries, keys = rotated(queries), rotated(keys)
        keys, values = (one.repeat_interleave(HEADS // one.shape[2], dim=2) for one in (keys, values))
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) / width**0.5
        x = x + torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values).flatten(-2) @ out.T
        h = rms(x, mlp_norm)
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    logits = rms(x, last_norm) @ head.T
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if kind == "dream" else logits  # as its sampler does


def drawn(kind, folder):
    """Write a folder with drawn weights and return them."""
    draw = torch.Generator().manual_seed(3)
    config, q = CONFIGS[kind], HEADS * HEAD[kind]
    kv = WIDTH if kind == "llada" else 2 * HEAD[kind]
    shapes = dict(zip(TABLES[kind], [(ROWS, WIDTH), (WIDTH,), (ROWS, WIDTH)], strict=True))
    sizes = [
        (WIDTH,),
        (q, WIDTH),
        (kv, WIDTH),
        (kv, WIDTH),
        (WIDTH, q),
        (WIDTH,),
        (48, WIDTH),
        (48, WIDTH),
        (WIDTH, 48),
    ]
    for layer in range(LAYERS):
        prefix, *names = BLOCK[kind]
        shapes |= {f"{prefix.format(layer)}{n}.weight": size for n, size in zip(names, sizes, strict=True)}
        if kind == "sdar":
            shapes |= {f"{prefix.format(layer)}self_attn.{n}_norm.weight": (12,) for n in "qk"}
        if kind == "dream":
            shapes |= {f"{prefix.format(layer)}self_attn.{n}_proj.bias": (q if n == "q" else kv,) for n in "qkv"}
    weights = {name: torch.randn(shape, generator=draw) * 0.3 + (len(shape) == 1) for name, shape in shapes.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_diffusion_model_computes_what_its_own_code_does(kind, tmp_path):
    weights = drawn(kind, tmp_path / "public")
    found = import_folder(tmp_path / "public", tmp_path / "in", tokenizer="byte")
    config = found.manifest.config
    assert config["method"]["name"] == "gidd"
    assert config["noise"]["shift"] == "masked"
    assert found.model.alignment == ("shifted" if kind == "dream" else "same")
    ids = torch.randint(0, ROWS, (2, 16), generator=torch.Generator().manual_seed(2))
    wanted = published_logits(kind, weights, ids).float()
    assert float(wanted.abs().max()) > 0.5
    torch.testing.assert_close(trainer_logits(found.folder, [(0, ids)])[0], wanted, rtol=1e-5, atol=1e-5)
    for layout in (Layout(2, 1, 1, 1, 1), Layout(1, 2, 1, 1, 1), Layout(2, 2, 1, 1, 1)):
        torch.testing.assert_close(layout_logits(found.folder, ids, layout), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="--mask-row is for autoregressive models, but"):
        import_folder(tmp_path / "public", tmp_path / "none", tokenizer="byte", mask_row="mean")
    folder = export(found.folder, tmp_path / "out", architecture=kind).folder
    again = import_folder(folder, tmp_path / "again", tokenizer="byte")
    assert (again.model, again.manifest.config["noise"]) == (found.model, config["noise"])
    back = load_file(folder / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    before, after = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "public", folder))
    assert {key: after[key] for key in before} == before


def _continued(config):
    try:
        return len(train_on_rank(config, 1).lines)
    except CheckpointError as error:
        return str(error)


def test_a_run_goes_on_from_it_with_other_rotations_and_no_other_sizes(toy_corpus, tmp_path):
    drawn("llada", tmp_path / "public")
    start = str(import_folder(tmp_path / "public", tmp_path / "in", tokenizer="byte").folder)
    model = {
        "layers": LAYERS, "hidden": WIDTH, "heads": HEADS, "kv_heads": HEADS, "ffn_hidden": 48, "mlp": "swiglu",
        "qk_norm": "none", "norm_eps": EPS, "seq_length": 32, "rope_base": 10 * THETA,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_seq_length": 16},
    }  # fmt: skip
    common = {"noise__shift": "masked", "data__valid": [], "schedule__steps": 4, "checkpoint__start_from": start}
    config = toy_config(toy_corpus, tmp_path, name="one", model=model, **common)
    assert on_ranks(1, _continued, config)[0] == 4
    config = toy_config(toy_corpus, tmp_path, name="other", model={**model, "kv_heads": 2}, **common)
    said = on_ranks(1, _continued, config)[0]
    assert "holds the weights of another model (checkpoint -> this run): model.kv_heads: 4 -> 2; set" in said


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"alibi": True}, "its alibi is true, wanted false"),
        ({"scale_logits": True}, "its scale_logits is true, wanted false"),
        ({"layer_norm_type": "default"}, "its layer_norm_type is 'default', wanted 'rms'"),
        ({"activation_type": "gelu"}, "activation is gelu with a gate, wanted the one of swiglu"),
        ({"n_layers": 5}, "num_hidden_layers=5, but the weight files beside it hold 2 layers"),
        ({"mask_token_id": 126336}, "its mask_token_id is 126336, but the mask of the tokenizer byte is 3"),
        ({"d_model": None}, "its config.json has no d_model"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rotary embeddings are scaled \(linear\)"),
    ],
)
def test_another_kind_of_llada_is_refused(changes, reason, tmp_path):
    drawn("llada", tmp_path / "public")
    (tmp_path / "public/config.json").write_text(json.dumps({**LLADA, **changes}))
    with pytest.raises(CheckpointError, match=reason):
        import_folder(tmp_path / "public", tmp_path / "in", tokenizer="byte")
