"""Checks of shapes and dtypes in every call of the annotated modules, by jaxtyping and beartype."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import jaxtyping
import torch
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable

from megadiff.diffusion import shapes

CHECKED = (
    "megadiff.diffusion.conditioning",
    "megadiff.diffusion.next_token",
    "megadiff.diffusion.noise_process",
    "megadiff.diffusion.noising",
    "megadiff.diffusion.objective",
    "megadiff.diffusion.philox",
    "megadiff.diffusion.processes",
    "megadiff.diffusion.schedules",
    "megadiff.diffusion.weightings",
    "megadiff.loss.fused_lm_head",
    "megadiff.loss.lm_head",
    "megadiff.loss.lm_head",
    "megadiff.sampling.ancestral",
    "megadiff.sampling.sampler",
)
"""Modules, or folders of them, whose annotations are checked. Triton compiles the source of its kernels, and what ships
in an exported folder has plain annotations, so neither is among them."""

_CHECKER = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have beartype check a function's arguments and result; an int may be given for a float."""
    return _CHECKER(function)


def install() -> None:
    """Check the modules that are imported from now on in this process and in those that it forks.

    Raises:
        RuntimeError: one of them is imported already, and would not be checked.
    """
    early = sorted(name for name in sys.modules if name.startswith(CHECKED))
    if early:
        raise RuntimeError(f"shapes cannot be checked in modules that are imported already: {', '.join(early)}")
    for name in ("Bool", "Float", "Int", "Integer"):
        setattr(shapes, name, getattr(jaxtyping, name))
    shapes.Tensor = torch.Tensor
    jaxtyping.install_import_hook(list(CHECKED), f"{__name__}.{check.__name__}")


@contextmanager
def unchecked() -> Iterator[None]:
    """Check nothing in the meantime: for arguments that the functions themselves have to refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def check_named_tuples() -> None:
    """Check the fields of the annotated modules' named tuples, which jaxtyping leaves out, wherever one is made."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(CHECKED)]
    for module in modules:
        for kind in list(vars(module).values()):
            if isinstance(kind, type) and hasattr(kind, "_fields") and kind.__module__ == module.__name__:
                _check_fields(kind)


def _check_fields(kind: type) -> None:
    """Replace `__new__` of a named tuple by one that checks the fields together: they share their axes."""
    make = kind.__new__
    if hasattr(make, "__wrapped__"):
        return
    hints = get_type_hints(kind, localns={"NoiseProcess": object})

    @functools.wraps(make)
    def checked(cls: type, *args: Any, **named: Any) -> Any:
        made = make(cls, *args, **named)
        with jaxtyping.jaxtyped("context"):
            for name, hint in hints.items():
                if not is_bearable(getattr(made, name), hint):
                    raise jaxtyping.TypeCheckError(f"{kind.__qualname__}.{name} is not {hint}: {getattr(made, name)}")
        return made

    kind.__new__ = checked
