"""The choice of a loss kernel by setting, platform and what is installed."""

from __future__ import annotations

import importlib.util

import pytest

from megadiff.errors import ConfigError
from megadiff.loss.fused_lm_head import choose_loss_kernel, fused_objective
from megadiff.loss.lm_head import plain_objective


def is_installed(monkeypatch, answer: bool) -> None:
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: (object() if answer else None) if name == "triton" else honest(name, *rest),
    )


def test_on_the_cpu_auto_is_chunked_and_says_why():
    described, head = choose_loss_kernel("auto", is_cpu=True)
    assert described == "chunked, since this run is on CPU ranks and Triton compiles for GPUs alone"
    assert head is fused_objective
    assert choose_loss_kernel("chunked", is_cpu=True) == ("chunked", fused_objective)
    assert choose_loss_kernel("plain", is_cpu=True) == ("plain", plain_objective)


def test_on_a_gpu_without_triton_auto_is_chunked_and_says_why(monkeypatch):
    is_installed(monkeypatch, False)
    described, head = choose_loss_kernel("auto", is_cpu=False)
    assert described.startswith("chunked, since the package triton is not installed")
    assert head is fused_objective


@pytest.mark.parametrize("wanted", ["auto", "triton"])
def test_on_a_gpu_with_triton_auto_takes_it(monkeypatch, wanted):
    from megadiff.loss import fused_lm_head

    is_installed(monkeypatch, True)
    monkeypatch.setattr(fused_lm_head, "_triton_kernel", lambda: plain_objective)
    assert choose_loss_kernel(wanted, is_cpu=False) == ("triton", plain_objective)


@pytest.mark.parametrize(
    ("is_cpu", "why"), [(True, "on CPU ranks"), (False, r"triton is not installed .* pip install triton")]
)
def test_triton_where_it_cannot_run_is_refused(monkeypatch, is_cpu, why):
    is_installed(monkeypatch, False)
    with pytest.raises(
        ConfigError, match=f"objective.loss_kernel is triton, but .*{why}.*; set objective.loss_kernel to auto or ch"
    ):
        choose_loss_kernel("triton", is_cpu=is_cpu)
