"""Settings of optimizer and learning-rate schedule, and what each role of parameters makes of them. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from megadiff.config.registry import Family
from megadiff.config.section import Section
from megadiff.scaling.flops import FlopCount

if TYPE_CHECKING:
    from megadiff.optim.member import Member


OPTIMIZERS = Family("megadiff.optim.members", key="name")
"""The optimizer family, whose contract is in the docstring of its package."""


class OptimizerConfig(Section):
    """`optimizer:` a member of the optimizer family, the settings of every member, and the member's own."""

    name: str = "adamw"
    """A file of `megadiff/optim/members/`, or the dotted path of a module of your own."""
    lr: float = Field(gt=0)
    """Peak learning rate; the base rate eta under `parametrisation: completep`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; norms, biases and, under `completep`, embedding and head have none."""
    clip_grad: float = Field(default=0.0, ge=0)
    """Largest global gradient norm; 0 leaves gradients alone."""
    parametrisation: Literal["standard", "completep"] = "standard"
    """`completep`: block matrices learn at lr / hidden with decay weight_decay x hidden, everything else at 0.02 lr
    (arXiv:2512.10858)."""


class AdamSettings(OptimizerConfig):
    """Settings of optimizers that divide by the root of a second moment."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment; divided by (hidden x layers) under `completep`."""
    eps_calibration: Literal["sum", "mean"] | None = None
    """Reduction that `eps` was tuned for. The released code's is `sum`: a mean loss has gradients smaller by the tokens
    of a step, and eps is divided by them (or multiplied, the other way round). Unset: eps as it stands."""


class ScheduleConfig(Section):
    """`schedule:` warm-up, a stable stretch, and a cooldown at the end. Give exactly one of steps, tokens and flops."""

    steps: int | None = Field(default=None, gt=0)
    """Optimizer steps of the whole run."""
    tokens: float | None = Field(default=None, gt=0)
    """Tokens of the whole run, rounded up to whole steps."""
    flops: float | None = Field(default=None, gt=0)
    """Training FLOPs of the whole run by `flop_count`, rounded up to whole steps."""
    flop_count: FlopCount = "deepseek"
    """Count of `flops`: `deepseek` is 6P + 12LdS a token without embedding and head, `chinchilla` 6P, and `full` 6(P +
    Vd) + 12LdS with the head, which needs `data.vocab_size`."""
    warmup_steps: int = Field(default=2000, ge=0)
    """Steps over which the rate rises linearly from 0."""
    decay_steps: float = Field(default=0.0, ge=0)
    """Steps of the final fall to 0; below 1 it is a fraction of the run."""
    decay_shape: Literal["sqrt", "linear", "cosine"] = "sqrt"
    """Form of the fall; `sqrt` is 1 - sqrt(s / C)."""

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        given = [name for name in ("steps", "tokens", "flops") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise ValueError(f"schedule needs exactly one of `steps`, `tokens` and `flops`; found {found}")
        return self

    def wanted_tokens(self, flops_per_token: float) -> float | None:
        """Return the number of tokens to train on; None if the length is given in steps."""
        return self.tokens if self.flops is None else self.flops / flops_per_token


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
