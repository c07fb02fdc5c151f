"""Tokens, states and heads that meet every branch of the objective, for tests of any implementation of the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.objective import Terms
from megadiff.diffusion.processes.gidd_time import GiddTime
from megadiff.loss.lm_head import LossInputs, LossOutput, LossSpec, loss_token_indices

VOCAB, MASK, TOKENS, HIDDEN = 61, 5, 70, 24
MIXES: dict[str, NoiseProcess] = {
    **{f"shift {shift:g}": HybridMixing(VOCAB, MASK, shift) for shift in (-1000.0, -75.0, -2.0, 0.0, 2.0, 1000.0)},
    "time": NoiseProcess(VOCAB, MASK, GiddTime(0.3)),
    "masked time": NoiseProcess(VOCAB, MASK, GiddTime()),
}
ONLY_MASKS = ("shift -1000", "shift -75", "masked time")


class Case(NamedTuple):
    """A head's question."""

    hidden: Tensor
    weight: Tensor
    tokens: LossInputs


def case(mix: str, dtype: torch.dtype, width: int = 64, *, seed: int = 3) -> Case:
    """States [T, d] and a head of `width` columns, those from VOCAB on padding.

    Some rows are sharp, some certain and right, log-SNRs reach both ends.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, HIDDEN, generator=g, dtype=torch.float64)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64) * 0.6
    clean = torch.randint(VOCAB - 1, (TOKENS,), generator=g)
    clean += clean >= MASK
    hidden[:5] *= 20
    hidden[5:8] = (
        400.0
        * torch.nn.functional.normalize(weight[clean[5:8]], dim=-1)
        / weight[clean[5:8]].norm(dim=-1, keepdim=True)
    )
    other = torch.randint(VOCAB - 1, (TOKENS,), generator=g)
    other += other >= MASK
    kind = torch.rand(TOKENS, generator=g)
    noised = torch.where(kind < 0.3, clean, torch.where(kind < 0.6, MASK, other))
    if mix in ONLY_MASKS:
        noised = torch.where(kind < 0.4, clean, MASK)
    if mix == "shift 1000":
        noised = torch.where(noised == MASK, clean, noised)
    log_snr = torch.rand(TOKENS, generator=g, dtype=torch.float64) * 18 - 9
    log_snr[8], log_snr[9] = -9.0, 9.0
    return Case(hidden.to(dtype), weight.to(dtype), LossInputs(clean, noised, log_snr))


def asked(
    head: Callable[..., LossOutput],
    mix: str,
    case: Case,
    *,
    needed: Tensor | None = None,
    factor: float = 1.7,
    **kwargs: Any,
) -> tuple[LossOutput, Tensor, Tensor]:
    """The answer, and the gradients of `factor` times its loss in states and weight."""
    spec = kwargs.pop("spec", None) or LossSpec(MIXES[mix])
    is_noisy = torch.ones_like(case.tokens.noised, dtype=torch.bool) if needed is None else needed
    computed = loss_token_indices(case.tokens.noised, is_noisy, spec.process)
    tokens = replace(case.tokens, active_indices=computed)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    answer = head(hidden, weight, tokens, spec, **kwargs)
    (answer.loss * factor).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return LossOutput(answer.loss.detach(), Terms(*answer.terms)), hidden.grad, weight.grad


def close(got: tuple[LossOutput, Any, Any], want: tuple[LossOutput, Any, Any], dtype: torch.dtype) -> None:
    """Terms per token to 1e-10 in float64 and 2e-5 nats in float32; gradients to 1e-5 of the largest."""
    tight = dtype == torch.float64
    rtol, atol = (1e-10, 1e-12) if tight else (2e-5, 2e-5)
    answer, reference = got[0], want[0]
    torch.testing.assert_close(answer.loss, reference.loss, rtol=rtol, atol=atol)
    for name in ("loss", "weight"):
        torch.testing.assert_close(
            getattr(answer.terms, name), getattr(reference.terms, name), msg=name, rtol=rtol, atol=atol
        )
    # 1 / p(lambda) is up to 8000, and rounding of about alpha * 1e-7 in the divergence grows with it
    torch.testing.assert_close(answer.terms.elbo, reference.terms.elbo, rtol=rtol, atol=10 * atol)
    for field in ("kl", "itakura_saito"):
        weighed = [terms.weight * getattr(terms, field) for terms in (answer.terms, reference.terms)]
        torch.testing.assert_close(*weighed, msg=field, rtol=rtol, atol=atol)
    allowed = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for made, expected in zip(got[1:], want[1:], strict=True):
        assert float((made - expected).abs().max()) <= allowed * float(expected.abs().max())
