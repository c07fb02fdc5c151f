"""LaProp: Adam with the normalisation before the momentum, as arXiv:2512.10858's code has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class LaProp(torch.optim.Optimizer):
    """LaProp with bias correction inside the moving averages.

    At step t = 1, 2, ... with bt(beta) = 1 - (1 - beta) / (1 - beta^t):

        nu    <- bt(b2) nu + (1 - bt(b2)) g^2
        mu    <- bt(b1) mu + (1 - bt(b1)) g / (sqrt(nu) + eps)
        theta <- theta - lr (mu + weight_decay theta)

    so the first step is sign(g). Both moments are at least float32 whatever the parameter's dtype.

    The moments are called `exp_avg` (mu) and `exp_avg_sq` (nu). The number of steps lives in each group's `step`; the
    per-parameter `step` mirrors it.

    Source: arXiv:2512.10858's released optimizer; arXiv:2002.04839 for the idea.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        """Take parameter groups with an `lr`, a `weight_decay` and an `eps` each, and the decays of both moments."""
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step on the gradients that the parameters hold."""
        result = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = int(group.get("step") or 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)
        return result

    def _update(self, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        t, (beta1, beta2) = group["step"], group["betas"]
        keep1, keep2 = _corrected(beta1, t), _corrected(beta2, t)
        states = [self._state_of(p) for p in parameters]
        mu, nu = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        gradients = [p.grad.to(m.dtype) for p, m in zip(parameters, mu, strict=True) if p.grad is not None]
        torch._foreach_mul_(nu, keep2)
        torch._foreach_addcmul_(nu, gradients, gradients, 1 - keep2)
        scale = torch._foreach_sqrt(nu)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_mul_(mu, keep1)
        torch._foreach_addcdiv_(mu, gradients, scale, 1 - keep1)
        weights = list[torch.Tensor](parameters)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, mu, alpha=-group["lr"])
        steps = [state["step"] for state in states]
        torch._foreach_zero_(steps)
        torch._foreach_add_(steps, t)

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        state = self.state[parameter]
        if len(state) == 0:
            state["step"] = torch.zeros(())
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        return state


def _corrected(beta: float, t: int) -> float:
    """bt(beta): the weight of the old average that keeps it unbiased."""
    return 1.0 - (1.0 - beta) / (1.0 - beta**t)
