"""`--verify`: the real command, and that it notices what it is for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from megadiff.data.tokenizers import load_tokenizer
from megadiff.diffusion.mixing import HybridMixing
from megadiff.errors import CheckpointError
from megadiff.export.export import export
from megadiff.export.verify import LEVELS, Trainer, noised_cases, sample_ids, verify
from tests.support.forked_command import call_forked

MIXING = HybridMixing(260, 3, 0.0)


def run_forked(command, *, env, **options):
    """A stand-in for `subprocess.run` that forks this process, where transformers is imported, instead of a new one."""
    script = command.index("-B") + 1

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "megadiff"]:
            del sys.modules[name]

    ended = call_forked(*command[script:], env=env, before=forget)
    return subprocess.CompletedProcess(command, ended.code, ended.out, ended.err)


@pytest.fixture
def warm(folder, monkeypatch):
    """Let `verify` load folders in forked processes."""
    import transformers

    assert transformers.PreTrainedModel  # imported now, not in each fork
    run = subprocess.run
    monkeypatch.setattr(
        "megadiff.export.verify.subprocess.run",
        lambda command, **options: (run_forked if "-B" in command else run)(command, **options),
    )


@pytest.fixture(scope="module")
def folder(checkpoints, tmp_path_factory):
    pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[hf]')")
    return export(checkpoints["tp1"], tmp_path_factory.mktemp("hf") / "toy").folder


def test_the_command_exports_verifies_and_imports(folder, checkpoints, tmp_path):
    tool = "tools/convert_checkpoint.py"
    made = tmp_path / "made"
    source = ("--checkpoint", checkpoints["tp1"])
    code, out, err = call_forked(tool, "export", *source, "--output", made, "--dtype", "bf16", "--verify")
    assert code == 0, err
    assert "verified fp32: equal" in out
    assert "verified bf16: equal" in out
    assert re.search(r"verified tokenizer: equal ids of \d\d sample texts in transformers", out)
    assert not list(made.glob("__pycache__"))
    code, out, err = call_forked(tool, "import", "--input", made, "--output", tmp_path / "back")
    assert code == 0, err
    assert "ready for checkpoint.start_from" in out
    code, _, err = call_forked(tool, "export", "--checkpoint", tmp_path / "back", "--output", made)
    assert code == 2
    assert err == f"error: {made} exists and is not an empty folder; give another --output, or move it away\n"


@contextmanager
def same_code_other_weights(folder, compute):
    """A stand-in for the trainer: the folder as it should be, loaded here."""
    import transformers

    dtype = torch.float32 if compute == "fp32" else torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()

    @torch.no_grad()
    def logits(case):
        return model(case.ids, prompt_lengths=torch.tensor([case.prompt_length])).logits

    yield Trainer(logits, model.lm_head.weight.data)


def verified(folder, against):
    cases = noised_cases(MIXING, length=16, knows_prompts=True)
    return verify(folder, lambda compute: same_code_other_weights(against, compute), cases)


def test_a_folder_equals_itself_and_a_zero_head_is_drawn_instead(folder, warm, tmp_path):
    blank = shutil.copytree(folder, tmp_path / "blank")
    from safetensors.torch import load_file, save_file

    weights = load_file(blank / "model.safetensors")
    weights["lm_head.weight"].zero_()
    save_file(weights, blank / "model.safetensors", metadata={"format": "pt"})
    found = verified(blank, blank)
    assert [one.head_was_zero for one in found] == [True, True]
    assert [one.largest for one in found] == [0.0, 0.0]
    assert found[0].scale > 0.1


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 3000.0), ("prompt_attention", "full")])
def test_another_model_is_noticed(folder, warm, tmp_path, key, value):
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=r"does not compute what the trainer does: fp32: NOT EQUAL"):
        verified(wrong, folder)


def test_other_token_ids_are_noticed(folder, warm):
    cases = noised_cases(MIXING, length=16, knows_prompts=True)[:1]
    texts = sample_ids(load_tokenizer("byte"), prepend_bos=False)
    assert len(texts) > 15
    with pytest.raises(
        CheckpointError, match=r"transformers reads other ids than the trainer: 'ab' gives \[101, 102\]"
    ):
        verify(
            folder,
            lambda compute: same_code_other_weights(folder, compute),
            cases,
            texts={**texts, "ab": [0, 101, 102]},
        )


def test_a_folder_that_does_not_stand_alone_is_noticed(folder, tmp_path):
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    path = wrong / "modeling_gidd.py"
    path.write_text(path.read_text() + "\nimport megadiff\n")
    with pytest.raises(
        CheckpointError, match=r"does not load in transformers: .*(stand alone|No module named 'megadiff')"
    ):
        verified(wrong, folder)


def test_sequences_are_noised_as_their_level_says():
    cases = noised_cases(HybridMixing(260, 3, -1000.0), length=4000, knows_prompts=True)
    shares = [float((case.ids == 3).float().mean()) for case in cases[: len(LEVELS)]]
    assert shares == pytest.approx([1 / (1 + 2.718281828**level) for level in LEVELS], abs=0.03)
    assert not (cases[-1].ids[:, : cases[-1].prompt_length] == 3).any()
    assert not (noised_cases(HybridMixing(260, 3, 1000.0), length=400, knows_prompts=False)[0].ids == 3).any()
