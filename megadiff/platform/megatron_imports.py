"""Faster import of megatron-core where there is no GPU; uses the standard library alone until megatron is imported.

Megatron-core decorates dozens of small functions with `jit_fuser`, which is `torch.compile`. The decoration alone
imports torch's compiler, 2.5 CPU seconds of every process. Ranks without a GPU never compile these functions, so
there the library's own `disable_jit_fuser` is called as soon as its module `megatron.core.jit` is imported, before any
function is decorated. (Importing that module earlier than the rest is not possible: it imports the rest.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_MODULE = "megatron.core.jit"


class _WithoutCompiler(MetaPathFinder):
    """Finder of `megatron.core.jit` that turns off compilation after the module's own code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's usual spec with a longer last step; None for every other module."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _MODULE else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_without_compiler(module: ModuleType) -> None:
            execute(module)
            import torch

            if not torch.cuda.is_available():
                module.disable_jit_fuser()

        spec.loader.exec_module = execute_without_compiler
        return spec


def install() -> None:
    """Install the finder. It is safe to call this again."""
    if not any(isinstance(finder, _WithoutCompiler) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WithoutCompiler())
