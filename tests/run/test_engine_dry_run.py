"""The dry run of Transformer Engine's layers: what its own autograd functions save, and the closed form beside it.

`MEGADIFF_TRANSFORMER_ENGINE` names a folder with the pure-Python wheel unpacked; `make test-versions` sets it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megadiff.run.config import RunConfig
from megadiff.run.dry_runs import Fullest, dry_runs
from tests.support.commands import REPOSITORY, write_yaml
from tests.support.engine_folder import FOLDER, NEEDS_ENGINE
from tests.support.forked_command import call_forked

pytestmark = NEEDS_ENGINE

RECIPES = ("none", "delayed", "tensorwise", "blockwise")
S, BATCH, D, F, HEADS, LAYERS = 256, 2, 256, 1024, 4, 4
TOKENS = S * BATCH
GIDD = {"qk_norm": "full", "sink": True, "mlp_bias": True}
LLAMA = {"qk_norm": "none", "kv_heads": 2, "mlp": "swiglu", "ffn_hidden": 768, "qkv_bias": True}
SPLIT = {"tensor": 2, "sequence": True}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
MLP = {"recompute": "selective", "recompute_modules": ["mlp"]}
ATTENTION = {"recompute": "selective", "recompute_modules": ["core_attn"]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "tensor": (2, {"parallel": {"tensor": 2}}),
    "sequence": (2, {"parallel": SPLIT}),
    "sequence, stages": (
        8,
        {"parallel": {"tensor": 4, "sequence": True, "pipeline": 2, "distributed_optimizer": True}},
    ),
    "interleaved": (2, {"parallel": INTERLEAVED}),
    "full": (1, {"parallel": {"recompute": "full"}}),
    "interleaved, full": (2, {"parallel": {**INTERLEAVED, "recompute": "full"}}),
    "sequence, full for some": (2, {"parallel": {**SPLIT, "recompute": "full", "recompute_layers": 2}}),
    "mlp": (1, {"parallel": MLP}),
    "sequence, mlp, the paper's block": (2, {"parallel": {**SPLIT, **MLP}, "model": GIDD}),
    "attention, a sink": (1, {"parallel": ATTENTION, "model": {"sink": True}}),
    "the paper's block": (1, {"model": GIDD}),
    "capped scores": (1, {"model": {**GIDD, "softcap": 30.0}}),
    "llama's block": (2, {"parallel": {"tensor": 2}, "model": LLAMA}),
}
ENDS: dict[str, tuple[int, dict[str, Any]]] = {
    "ends in bf16": (1, {}),
    "ends in bf16, interleaved": (2, {"parallel": INTERLEAVED, "model": {"layers": 8}}),
    "ends in bf16, full for some": (1, {"parallel": {"recompute": "full", "recompute_layers": 2}}),
}


def _tree(*, fp8: str = "none", ends: int = 0, model: Any = None, parallel: Any = None, **rest: Any) -> dict[str, Any]:
    return {
        "name": "engine",
        "platform": "cuda",
        "transformer_impl": "transformer_engine",
        "model": {"layers": LAYERS, "hidden": D, "heads": HEADS, "seq_length": S, "qk_norm": "none", **(model or {})},
        "data": {"train": ["x"], "valid": [], "tokenizer": "not-there", "vocab_size": 500},
        "precision": {"compute": "bf16", "fp8": fp8, "fp8_first_last_bf16": ends},
        "batch": {"global_batch_size": 32, "micro_batch_size": BATCH},
        "schedule": {"steps": 10000},
        "optimizer": {"lr": 1e-3},
        "parallel": parallel or {},
        **rest,
    }


LOCAL = _tree(transformer_impl="local", model=GIDD, parallel=SPLIT)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Return the reports of all dry runs, made by one process."""
    runs = {
        f"{name}, {fp8}": [ranks, _tree(fp8=fp8, **parts)]
        for name, (ranks, parts) in LAYOUTS.items()
        for fp8 in RECIPES
    }
    for name, (ranks, parts) in ENDS.items():
        for fp8 in RECIPES[2:]:
            runs[f"{name}, {fp8}"] = [ranks, _tree(fp8=fp8, ends=2 if ranks > 1 else 1, **parts)]
    runs["local"] = [2, LOCAL]
    command = [sys.executable, "-m", "tests.support.engine_dry_runs", FOLDER]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=env, input=json.dumps(runs), capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


BOTH = [(name, fp8) for name in LAYOUTS for fp8 in RECIPES] + [(name, fp8) for name in ENDS for fp8 in RECIPES[2:]]


@pytest.mark.parametrize(("layout", "fp8"), BOTH)
def test_the_closed_form_agrees_with_the_library(found: dict[str, Any], layout: str, fp8: str) -> None:
    report = found[f"{layout}, {fp8}"]
    assert report["engine_problem"] == ""
    assert ("bf16" if fp8 == "none" else f"FP8 {fp8}") in report["layers"]
    for rank in report["ranks"]:
        assert rank["configured"] == rank["estimated"]
        for name, tolerance in {"parameters": 1e-3, "gradients": 0, "optimizer": 1e-3, "activations": 0.01}.items():
            assert rank["built"][name] == pytest.approx(rank["estimated"][name], rel=tolerance), name


OPERAND = {"none": 2.0, "delayed": 1.0, "tensorwise": 1.0, "blockwise": 1 + 4 / 128}
"""Bytes of an element that a matrix read: bf16, a byte of FP8, and by blocks a float32 scale for 128 of them."""


@pytest.mark.parametrize("fp8", RECIPES)
def test_a_plain_layer_saves_what_the_sources_say(found: dict[str, Any], fp8: str) -> None:
    """Bytes of a token in release 2.11, by what each autograd function passes to `save_for_backward`.

    `_LayerNormLinear` (module/layernorm_linear.py): the input in bf16, the normalised input as the product read it, and
    1 / rms in float32. Attention: q, k and v, which lie in the output of that matrix, q and k rotated, the output, a
    float32 for each head. `_Linear` behind it (module/linear.py): its input, in bf16 the attention's own output; in FP8
    a copy of it under `delayed`, and that output again under the other recipes, for which megatron-core sets
    `save_original_input`. `_LayerNormLinear` of the MLP as before, the input of relu, and `_Linear` the squared relu.
    The last norm (ops/basic/rmsnorm.py): its input and 1 / rms. Rotary angles: a float32 for each place of a head.
    """
    (rank,) = found[f"plain, {fp8}"]["ranks"]
    operand = OPERAND[fp8]
    norm = D * (2 + operand) + 4
    attention = 2 * (3 * D + 2 * D + D) + 4 * HEADS + (D if fp8 == "delayed" else 0)
    mlp = F * (2 + operand)
    wanted = TOKENS * (LAYERS * (2 * norm + attention + mlp) + 2 * D + 4) + S * (D // HEADS) * 4
    scales = 4 * 4 * LAYERS  # of whole tensors: one for each matrix
    assert 0 <= rank["built"]["activations_per_microbatch"] - wanted <= scales


def test_fp8_weights_are_kept_twice_beside_those_in_bf16(found: dict[str, Any]) -> None:
    weights = LAYERS * (4 * D * D + 2 * D * F)
    bf16 = found["plain, none"]["ranks"][0]["built"]["parameters"]
    for fp8, scale in (("delayed", 4), ("tensorwise", 4), ("blockwise", 0)):
        copies = found[f"plain, {fp8}"]["ranks"][0]["built"]["parameters"] - bf16
        if fp8 == "blockwise":  # scales of blocks of 128 x 128, whose rows are padded to 4
            shapes = [(3 * D, D), (D, D), (F, D), (D, F)]
            scale = sum(
                4 * a * (-(-b // 4) * 4) for m, n in shapes for a, b in ((m // 128, n // 128), (n // 128, m // 128))
            )
            assert copies == 2 * weights + LAYERS * scale
        else:
            assert copies == 2 * weights + LAYERS * 4 * scale


@pytest.mark.parametrize("layout", ["tensor", "sequence"])
def test_tensor_ranks_exchange_as_often_as_with_local_layers(found: dict[str, Any], layout: str) -> None:
    """Under `delayed` two more: the largest values of all matrices, forward and backward."""
    calls = 10 * LAYERS + 4 if layout == "sequence" else 4 * LAYERS + 2
    for fp8 in ("none", "tensorwise", "delayed"):
        for rank in found[f"{layout}, {fp8}"]["ranks"]:
            assert rank["tensor_calls"] == calls + 2 * (fp8 == "delayed")
    bf16, fp8_bytes = (found[f"{layout}, {fp8}"]["ranks"][0]["tensor_bytes"] for fp8 in ("none", "tensorwise"))
    assert (fp8_bytes < bf16) == (layout == "sequence"), "gathered in FP8, reduced in bf16"


def test_local_layers_are_built_as_without_the_library(found: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    words = ("--ranks", "2", "--all-stages", "--output", str(out))
    ended = call_forked("tools/dry_run.py", "--config", write_yaml(tmp_path / "run.yaml", LOCAL), *words)
    assert ended.code == 0, ended.err
    assert json.loads(out.read_text()) == found["local"]


def test_the_command_builds_them_where_the_package_is(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/dry_run.py",
        "--config",
        str(write_yaml(tmp_path / "run.yaml", _tree(fp8="delayed"))),
    ]
    path = os.pathsep.join([FOLDER, str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(
        [*command, "--ranks", "1"], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert "Transformer Engine's layers in FP8 delayed" in ended.stdout
    assert "not built" not in ended.stdout
    assert "as configured" not in ended.stdout


def test_other_commands_build_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    runs = [(RunConfig.model_validate(_tree(fp8="tensorwise")), 1), (RunConfig.model_validate(LOCAL), 2)]
    fullest = dry_runs(runs, limit_s=300)
    assert fullest is not None
    assert all(isinstance(each, Fullest) and each.not_built == "" for each in fullest)
