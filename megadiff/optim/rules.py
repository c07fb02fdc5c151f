"""Learning rate, weight decay and epsilon of each role, relative to the settings. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megadiff.optim.config import OptimizerConfig

if TYPE_CHECKING:
    from megadiff.optim.member import Member


ROLES = ("hidden", "embedding", "head", "norm", "bias")
"""Roles of parameters; `hidden` are the blocks' matrices."""


@dataclass(frozen=True)
class Rule:
    """Factors by which the settings are multiplied for the parameters of one role."""

    lr_mult: float
    wd_mult: float


def rules(settings: OptimizerConfig, *, hidden: int) -> dict[str, Rule]:
    """Return the rule of each role.

    Source of `completep`: arXiv:2512.10858, CompleteP table (hidden matrices: eta / d, decay x d so that lr x decay is
    free of the width; every other role 0.02 eta and no decay).
    """
    if settings.parametrisation == "completep":
        side = Rule(0.02, 0.0)
        return {
            "hidden": Rule(1.0 / hidden, float(hidden)),
            "embedding": side,
            "head": side,
            "norm": side,
            "bias": side,
        }
    matrix, vector = Rule(1.0, 1.0), Rule(1.0, 0.0)
    return {"hidden": matrix, "embedding": matrix, "head": matrix, "norm": vector, "bias": vector}


@dataclass(frozen=True)
class Scale:
    """Sizes on which epsilon depends beside the settings."""

    hidden: int
    layers: int
    tokens_per_step: int
    """Number of tokens over which a gradient is summed, those without noise included."""
    reduction: Literal["sum", "mean"]
    """Reduction of the loss over tokens."""


def effective_eps(settings: OptimizerConfig, scale: Scale) -> float | None:
    """Return epsilon of every group, or None for an optimizer that has no setting `eps`.

    The setting is divided by hidden x layers under `completep`, and brought from the loss's reduction that it was
    calibrated for (`eps_calibration`) to that of this run. Source: arXiv:2512.10858's code (eps = 1e-8 / (d L) with
    summed losses).
    """
    eps: float | None = getattr(settings, "eps", None)
    if eps is None:
        return None
    if settings.parametrisation == "completep":
        eps = eps / (scale.hidden * scale.layers)
    if getattr(settings, "eps_calibration", None) in (None, scale.reduction):
        return eps
    return eps / scale.tokens_per_step if scale.reduction == "mean" else eps * scale.tokens_per_step


@dataclass(frozen=True)
class Effective:
    """The numbers that the optimizer applies to the parameters of one role at the peak of the schedule."""

    role: str
    lr: float
    weight_decay: float
    eps: float | None
    """None where the role's updates use none."""
    factor: str
    """Factor between `optimizer.lr` and `lr`, as text such as `1/128` or `0.02`; empty where it is 1."""
    own: dict[str, Any]
    """Values of the optimizer's own settings that this role's updates use, where they differ from other roles'."""


def effective(settings: OptimizerConfig, scale: Scale, member: Member) -> list[Effective]:
    """Return what each role's parameters are updated with, in the order of `ROLES`."""
    eps = effective_eps(settings, scale)
    found = []
    for role, rule in rules(settings, hidden=scale.hidden).items():
        is_per_width = rule.lr_mult != 1 and rule.lr_mult == 1.0 / scale.hidden
        factor = f"1/{scale.hidden}" if is_per_width else "" if rule.lr_mult == 1 else f"{rule.lr_mult:g}"
        names = member.role_settings.get(role)
        found.append(
            Effective(
                role,
                settings.lr * rule.lr_mult,
                settings.weight_decay * rule.wd_mult,
                eps if names is None or "eps" in names else None,
                factor,
                {name: getattr(settings, name) for name in names or () if name != "eps"},
            )
        )
    return found
