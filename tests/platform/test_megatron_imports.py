"""A process without a GPU imports megatron-core without torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megadiff.platform import megatron_imports

_AFTER = (
    "import sys, warnings; warnings.simplefilter('ignore'); {imports}; import megatron.core.jit as jit; print({facts})"
)


def _facts(imports: str, facts: str) -> str:
    command = [sys.executable, "-c", _AFTER.format(imports=imports, facts=facts)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(torch.cuda.is_available(), reason="megatron-core compiles its small functions on a GPU")
def test_without_a_gpu_the_model_is_imported_without_torchs_compiler():
    facts = "'torch._inductor' in sys.modules, jit.jit_fuser is jit.noop_decorator"
    assert _facts("import megadiff.run.build", facts) == "False True"


def test_megatron_imported_first_compiles_and_is_told_not_to():
    """The package cannot undo the decoration, so compiled functions are run as they are."""
    imports = "import megatron.core, torch; from megadiff.platform import megatron_on_cpu; megatron_on_cpu.install()"
    facts = "jit.jit_fuser is torch.compile, torch.compile(lambda x: x + 1)(torch.ones(1)).item()"
    assert _facts(imports, facts) == "True 2.0"


def test_the_finder_is_installed_once_and_leaves_other_modules_alone():
    megatron_imports.install()
    finders = [finder for finder in sys.meta_path if isinstance(finder, megatron_imports._WithoutCompiler)]
    assert len(finders) == 1
    assert finders[0].find_spec("megatron.core.utils", None) is None
