"""A process without a GPU imports megatron-core, and trains, without torch's compiler."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

from megadiff.platform import without_compiler
from tests.support.runs import toy_tree

NEEDS_NO_COMPILER = pytest.mark.skipif(
    torch.cuda.is_available() or not version("megatron-core").startswith("0.16."),
    reason="megatron-core compiles small functions on a GPU, and newer ones compile one while they are imported",
)
_AFTER = (
    "import sys, warnings; warnings.simplefilter('ignore'); {imports}; import megatron.core.jit as jit; print({facts})"
)


def _facts(imports: str, facts: str) -> str:
    command = [sys.executable, "-c", _AFTER.format(imports=imports, facts=facts)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_megatron_imported_first_compiles_and_is_told_not_to():
    """The package cannot undo the decoration, so compiled functions are run as they are."""
    imports = "import megatron.core, torch; from megadiff.platform import megatron_on_cpu; megatron_on_cpu.install()"
    facts = "jit.jit_fuser is torch.compile, torch.compile(lambda x: x + 1)(torch.ones(1)).item()"
    assert _facts(imports, facts) == "True 2.0"


def test_the_finder_is_installed_once_and_leaves_other_modules_alone():
    without_compiler.install()
    finders = [finder for finder in sys.meta_path if isinstance(finder, without_compiler._WithoutCompiler)]
    assert len(finders) == 1
    assert finders[0].find_spec("megatron.core.utils", None) is None


_STEPS = """
import os, sys, torch
from megadiff.platform import without_compiler

def take_steps():
    torch.manual_seed(0)
    drawn = [torch.randn(5, 3) for _ in range(4)]
    for build in (
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ):
        weight = torch.nn.Parameter(drawn[0].clone())
        optimizer = build([weight])
        for gradient in drawn[1:]:
            optimizer.zero_grad()
            weight.grad = gradient.clone()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        print(weight.tolist(), torch.is_grad_enabled(), sorted(optimizer.state[weight]))
    print('torch._dynamo' in sys.modules, flush=True)

if child := os.fork():  # a process in which torch's optimizers are as they were
    assert os.waitpid(child, 0)[1] == 0
    without_compiler.release_optimizers()
    without_compiler.release_optimizers()
take_steps()
"""


def test_released_optimizers_step_alike_without_the_compiler():
    command = [sys.executable, "-c", _STEPS]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    *figures_before, had_compiler = lines[: len(lines) // 2]
    *figures, has_compiler = lines[len(lines) // 2 :]
    assert len(figures) == 3
    assert figures == figures_before
    assert (has_compiler, had_compiler) == ("False", "True")


_RUNS = """
import sys, warnings
warnings.simplefilter("ignore")
import os
import megadiff.run.build
import megatron.core.jit as jit
from megadiff.cli.train import main

def compilers():
    return [name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules]

print(compilers(), jit.jit_fuser is jit.noop_decorator, flush=True)
for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        sys.argv[1:] = ["--config", path]
        main()
        print(path, compilers())
        break
    assert os.waitpid(child, 0)[1] == 0
"""


@NEEDS_NO_COMPILER
def test_a_run_without_a_gpu_imports_no_compiler(tmp_path: Path, toy_corpus: Path):
    """Neither does the import of all that trains: the model is imported without torch's compiler."""
    paths = []
    for optimizer in ("adamw", "laprop"):
        settings = {"schedule__steps": 4, "optimizer": {"name": optimizer, "lr": 0.001}}
        config = toy_tree(toy_corpus, tmp_path, name=optimizer, **settings)
        paths.append(tmp_path / f"{optimizer}.yaml")
        paths[-1].write_text(yaml.safe_dump(config))
    ended = subprocess.run([sys.executable, "-c", _RUNS, *map(str, paths)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == "[] True"
    assert [line for line in lines if line.endswith(" []")] == [f"{path} []" for path in paths]
