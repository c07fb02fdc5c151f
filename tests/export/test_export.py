"""Exported folders as a user loads them: `from_pretrained(..., trust_remote_code=True)`, equal to the trainer."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch
from safetensors import safe_open

from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import CheckpointError, ConfigError
from megadiff.export.export import export
from megadiff.export.weight_files import StoredTensors
from tests.export.conftest import LAYOUTS
from tests.export.runs import sequences_with_prompts, trainer_logits


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    """The four-rank run's export."""
    return export(checkpoints["tp2_pp2"], tmp_path_factory.mktemp("hf") / "toy").folder


def loaded(transformers, folder, kind="AutoModelForCausalLM", **options):
    model = getattr(transformers, kind).from_pretrained(folder, trust_remote_code=True, **options)
    return model[0].eval() if isinstance(model, tuple) else model.eval()


@torch.no_grad()
def logits_of(model, sequences):
    return [model(ids, prompt_lengths=torch.full((len(ids),), prompt)).logits for prompt, ids in sequences]


def all_weights(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_exports_to_the_trainers_logits(transformers, checkpoints, tmp_path, layout):
    """With a head, sinks, biases and gains that are not zero, and a cap that is felt; at no prompt, some, and all."""
    folder = export(checkpoints[layout], tmp_path / "out").folder
    weights = all_weights(folder)
    assert min(float(weight.abs().max()) for weight in weights.values()) > 1e-3
    sequences = sequences_with_prompts()
    wanted = trainer_logits(checkpoints[layout], sequences)
    found = logits_of(loaded(transformers, folder, dtype=torch.float32), sequences)
    assert all(0.1 < float(one.abs().max()) < 30 for one in wanted)
    for ours, theirs in zip(wanted, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 100.0), ("attn_soft_cap", None), ("head_scaling", 1.0), ("resid_scale", 3.0)]
)
def test_the_comparison_notices_one_wrong_key(transformers, checkpoints, folder, tmp_path, key, value):
    shutil.copytree(folder, tmp_path / "wrong")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "wrong/config.json").write_text(json.dumps({**config, key: value}))
    sequences = sequences_with_prompts()[:1]
    right, wrong = (
        logits_of(loaded(transformers, f, dtype=torch.float32), sequences)[0] for f in (folder, tmp_path / "wrong")
    )
    assert float((right - wrong).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"])
def test_every_auto_class_loads_every_weight(transformers, folder, kind):
    model, said = getattr(transformers, kind).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    body = model if kind == "AutoModel" else model.model
    assert torch.equal(body.embed_tokens.weight, all_weights(folder)["model.embed_tokens.weight"])
    assert not list(model.named_buffers())


def test_a_model_saved_by_transformers_loads_again_and_computes_the_same(transformers, folder, tmp_path):
    model = loaded(transformers, folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    sequences = sequences_with_prompts()
    again = logits_of(loaded(transformers, tmp_path / "again", dtype=torch.float32), sequences)
    assert all(torch.equal(a, b) for a, b in zip(logits_of(model, sequences), again, strict=True))


def test_a_fresh_model_from_the_config_has_first_weights_of_the_paper(transformers, folder):
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.head_init_scale = 0.0
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert not model.lm_head.weight.any()
    assert not model.model.layers[0].self_attn.k_bias.any()
    assert float(model.model.layers[0].mlp.up_proj.weight.detach().std()) == pytest.approx(config.init_scale, rel=0.1)


def test_tokens_come_out_with_the_runs_own_ids(transformers, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Größe: 3 m² — ok?\n\t<|mask|"
    assert tokenizer(text, add_special_tokens=False).input_ids == ByteTokenizer().encode(text)
    assert tokenizer.decode(ByteTokenizer().encode(text)) == text
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, len(tokenizer)) == (3, 1, 260)


def test_generate_fills_sequences_whatever_they_are_batched_with(transformers, folder):
    model = loaded(transformers, folder, dtype=torch.float32)
    prompt = torch.tensor([[0, 9, 10, 11]])
    options = {"max_new_tokens": 8, "max_denoising_steps": 8, "block_length": 4, "eos_token_id": None}
    one = model.generate(prompt, seed=[5], **options)
    two = model.generate(prompt.repeat(2, 1), seed=[4, 5], return_dict_in_generate=True, **options)
    assert one.shape == (1, 12)
    assert torch.equal(one[:, :4], prompt)
    assert not (one == 3).any()
    assert torch.equal(one[0], two.sequences[1])
    assert torch.equal(one, model.generate(prompt, seed=[5], use_cache=False, **options))
    assert torch.equal(
        one, model.generate(inputs=prompt, seed=[5], max_length=8, steps=8, block_length=4, eos_token_id=None)
    )
    greedy = model.generate(prompt, seed=[5], temperature=0, **options)
    assert torch.equal(greedy, model.generate(prompt, seed=[5], do_sample=False, **options))
    assert torch.equal(one, model.generate(prompt, seed=[5], do_sample=True, **options))
    with pytest.raises(
        ValueError, match="prompt and new tokens are 17 tokens, the model was trained on sequences of 16"
    ):
        model.generate(prompt, max_new_tokens=13)


def test_cached_and_masked_attention_compute_the_same(transformers, folder):
    model = loaded(transformers, folder, dtype=torch.float32)
    ids = torch.arange(20, 36)[None]
    with torch.no_grad():
        whole = model(ids, prompt_lengths=torch.tensor([6])).logits
        seen = model.model(ids[:, :6], use_cache=True)
        rest = model(ids[:, 6:], cache=seen.cache).logits
        same = model(ids[:, 6:], past_key_values=seen.past_key_values).logits  # its name before transformers 5.24
        order = torch.arange(16) >= 6
        masked = model(ids, attention_mask=(order[:, None] >= order)[None]).logits
        padded = model(torch.cat([ids, ids[:, :3]], dim=1), attention_mask=(torch.arange(19) < 16).long()[None]).logits
        plain = model(ids).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=0, atol=2e-5)
    assert torch.equal(rest, same)
    torch.testing.assert_close(masked, whole, rtol=0, atol=2e-5)
    torch.testing.assert_close(padded[:, :16], plain, rtol=0, atol=2e-5)
    assert float((plain - whole).abs().max()) > 1e-2


def test_dead_sequences_go_and_small_files_hold_the_same_weights_in_bf16(checkpoints, folder, tmp_path):
    stored = StoredTensors(checkpoints["tp2_pp2"])
    assert stored.shape("embedding.word_embeddings.weight") == (384, 32)
    found = export(checkpoints["tp2_pp2"], tmp_path / "cut", dtype="bf16", max_shard_bytes=20_000)
    cut, whole = all_weights(found.folder), all_weights(folder)
    assert cut["model.embed_tokens.weight"].shape == (260, 32)
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name].to(torch.bfloat16)) for name in whole)
    index = json.loads((found.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found.bytes == 2 * found.parameters
    files = sorted(found.folder.glob("model-*-of-*.safetensors"))
    assert len(files) > 3
    assert max(path.stat().st_size for path in files) < 25_000
    assert json.loads((found.folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_folder_says_what_it_holds(folder):
    assert subprocess.run(["sha256sum", "--check", "--quiet", "checksums.sha256"], cwd=folder).returncode == 0
    listed = {line.split("  ")[1] for line in (folder / "checksums.sha256").read_text().splitlines()}
    assert listed == {path.name for path in folder.iterdir() if path.is_file()} - {"checksums.sha256"}
    card = (folder / "README.md").read_text()
    for fact in ("67,232", "balanced noise", "4 steps, 512 tokens", "nats per noisy token"):
        assert fact in card


def test_an_output_that_holds_something_is_left_alone(checkpoints, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not an empty folder; give another --output"):
        export(checkpoints["tp1"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(checkpoints, tmp_path):
    broken = shutil.copytree(checkpoints["tp1"], tmp_path / "broken")
    shard = next(broken.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged: its content has changed since it was written"):
        export(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
