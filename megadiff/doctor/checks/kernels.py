"""Fast kernels: which are there, and the package that only shares Apex's name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from megadiff.doctor.finding import Finding, ok, warn
from megadiff.doctor.subject import Subject


def check(subject: Subject) -> Iterable[Finding]:
    """On CPU none is needed."""
    from megadiff.platform.machine import apex_project

    apex = apex_project()
    if apex == "other":
        yield warn(
            "the installed package `apex` is not NVIDIA's Apex but another project of that name on PyPI",
            "pip uninstall apex; Transformer Engine does Apex's jobs, or build NVIDIA's from source",
        )
    present = {"Triton": _is_there("triton"), "Transformer Engine": _is_there("transformer_engine")}
    found = [name for name, has in {**present, "Apex": apex == "nvidia"}.items() if has]
    if subject.platform.is_cpu:
        yield ok(f"CPU: plain torch kernels are used; installed: {', '.join(found) or 'no others'}")
        return
    yield ok(f"{subject.platform.device_name}; installed: {', '.join(found) or 'no fast kernels'}")
    if not present["Transformer Engine"]:
        yield warn("no Transformer Engine: slower layers, no FP8", "pip install 'megadiff[te]' beside a CUDA torch")
    if not present["Triton"]:
        yield warn("no Triton: fused kernels fall back to plain torch", "pip install triton (CUDA torch brings it)")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
