"""The Triton kernels through the whole compiler for an H100, which needs no GPU; read as machine code.

The interpreter takes more than the compiler does, and knows nothing of how memory is read.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megadiff.loss import triton_passes

HOPPER = GPUTarget("cuda", 90, 32)
KERNELS = {
    "sums": (triton_passes._sums, {}),
    "log1p_sums": (triton_passes._log1p_sums, {}),
    "gradient": (triton_passes._gradient, {"HAS_LOG1P": True}),
    "gradient under masked noise": (triton_passes._gradient, {"HAS_LOG1P": False}),
}


def machine_code(kernel: Any, more: dict[str, bool], dtype: str, folder: Path, *, aligned: bool = True) -> list[str]:
    """Instructions of the kernel as `TritonPasses` starts it; `aligned`: the width is a multiple of 16."""
    names = kernel.arg_names
    types = {"logits": f"*{dtype}", "clean_ids": "*i64", "noised_ids": "*i64"}
    options = {key: triton_passes._CONSTANTS[key] for key in ("num_warps", "enable_fp_fusion")}
    constants = {"TILES": triton_passes._CONSTANTS["TILES"], "TILE": triton_passes._CONSTANTS["TILE"], **more}
    signature, hints = {}, {}
    for place, name in enumerate(names):
        is_per_row = name.endswith(("_in", "_out"))
        signature[name] = "constexpr" if name in constants else "*fp32" if is_per_row else types.get(name, "i32")
        if signature[name].startswith("*") or (aligned and name in ("stride", "width")):
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, constexprs={(names.index(name),): value for name, value in constants.items()}, attrs=hints
    )
    compiled = triton.compile(source, target=HOPPER, options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, "-c", binary], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", text, re.MULTILINE)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_logits_move_16_bytes_at_a_time_and_nothing_spills(name, dtype, tmp_path):
    found = machine_code(*KERNELS[name], dtype, tmp_path)
    loads = 4 if dtype != "fp32" else 8
    assert found.count("LDG.E.128") == loads
    assert found.count("STG.E.128") == (loads if name.startswith("gradient") else 0)
    assert not [code for code in found if code.startswith(("LDL", "STL"))], "registers in local memory"


@pytest.mark.parametrize("name", KERNELS)
def test_a_width_that_is_no_multiple_compiles(name, tmp_path):
    assert machine_code(*KERNELS[name], "bf16", tmp_path, aligned=False)


def test_columns_share_logarithms_and_reciprocals(tmp_path):
    """32 columns a thread: an exponential each, a reciprocal for every 4; the logarithm is arithmetic."""
    found = machine_code(*KERNELS["log1p_sums"], "bf16", tmp_path)
    assert (found.count("MUFU.EX2"), found.count("MUFU.RCP")) == (32, 8)
