"""A faster start where there is no GPU: megatron-core and torch's optimizers without torch's compiler.

This module uses the standard library alone until megatron is imported. Megatron-core decorates dozens of small
functions with `jit_fuser`, which is `torch.compile`. The decoration alone imports torch's compiler, 2.5 CPU seconds of
every process. Ranks without a GPU never compile these functions, so there the library's own `disable_jit_fuser` is
called as soon as its module `megatron.core.jit` is imported, before any function is decorated. (Importing that module
earlier than the rest is not possible: it imports the rest.) Version 0.19 also decorates a function with `torch.compile`
itself, so there the compiler is loaded all the same.

Torch's optimizers import the compiler too, 1.3 CPU seconds of every rank, only to mark where a compiled optimizer step
would be interrupted. `release_optimizers` takes these marks away; the arithmetic of a step stays the library's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

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


def release_optimizers() -> None:
    """Make torch's own optimizers work without torch's compiler. It is safe to call this again.

    Two wrappers of `torch.optim` are meant: `_use_grad_for_differentiable`, which sets the gradient mode of a step
    between two graph breaks, and `torch._disable_dynamo`, which looks for the compiler at the first call. A version of
    torch without them is left as it is.
    """
    import torch
    from torch import _compile

    for kind in (torch.optim.Optimizer, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        for name, function in list(vars(kind).items()):
            plain, code = getattr(function, "__wrapped__", None), getattr(function, "__code__", None)
            if plain is None or code is None:
                continue
            if code.co_name == "_use_grad":
                setattr(kind, name, _in_its_gradient_mode(plain))
            elif code.co_name == "inner" and code.co_filename == _compile.__file__:
                plain.__dynamo_disable = plain


def _in_its_gradient_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return an optimizer's step under the gradient mode that its `differentiable` setting needs."""
    import torch

    @wraps(step)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return run
