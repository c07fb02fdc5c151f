"""Check of the fast kernels, and for the package that only shares Apex's name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from megadiff.doctor.examination import Finding, Subject, fail, ok, warn


def check(subject: Subject) -> Iterable[Finding]:
    """List the available fast kernels; on CPU none is needed."""
    from megadiff.platform.machine import apex_project

    apex = apex_project()
    if apex == "other":
        yield warn(
            "the installed package `apex` is not NVIDIA's Apex but another project of that name on PyPI",
            "pip uninstall apex; Transformer Engine replaces Apex, or build NVIDIA's from source",
        )
    yield from _refused(subject)
    present = {"Triton": _is_there("triton"), "Transformer Engine": _is_there("transformer_engine")}
    found = [name for name, has in {**present, "Apex": apex == "nvidia"}.items() if has]
    if subject.platform.is_cpu:
        yield ok(f"CPU: plain torch kernels are used; installed: {', '.join(found) or 'no others'}")
        return
    yield ok(f"{subject.platform.device_name}; installed: {', '.join(found) or 'no fast kernels'}")
    if present["Transformer Engine"] and subject.platform.layers_problem:
        yield warn(
            f"Transformer Engine is installed, but {subject.platform.layers_problem}",
            "install transformer-engine[pytorch]>=2.9,<2.12 for this torch; until then layers are local, without FP8",
        )
    if subject.platform.weight_gradients is None:
        yield warn(
            f"weight gradients are accumulated in a separate step: {subject.platform.weight_gradients_problem}",
            "install torch 2.11 or newer, or build NVIDIA's Apex",
        )
    if not present["Transformer Engine"]:
        yield warn("no Transformer Engine: slower layers, no FP8", "pip install 'megadiff[te]' beside a CUDA torch")
    if not present["Triton"]:
        yield warn("no Triton: fused kernels fall back to plain torch", "pip install triton (CUDA torch brings it)")


def _refused(subject: Subject) -> Iterable[Finding]:
    """Report settings of the run that this machine cannot provide."""
    if subject.config is None:
        return
    from megadiff.errors import PlatformError
    from megadiff.model.kernels import check_kernels

    try:
        check_kernels(subject.config.parallel, subject.config.precision, subject.platform)
    except PlatformError as error:
        yield fail(str(error), "remove that setting, or run on a machine that supports it")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
