"""Settings of the optimizer and what each role of parameters makes of them; the learning rate's schedule. No torch.

The schedule counts steps from 0: `factor(s)` scales the update that makes step s into step s + 1, s in [0, steps). So
the very first update of a warmed-up run has rate 0 and the last one of a cooled-down run a rate just above 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from megadiff.config.registry import Family
from megadiff.config.section import Section
from megadiff.errors import ConfigError
from megadiff.scaling.flops import FlopCount

if TYPE_CHECKING:
    from megadiff.optim.members import Member

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


DecayShape = Literal["sqrt", "linear", "cosine"]


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
    decay_shape: DecayShape = "sqrt"
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


@dataclass(frozen=True)
class WarmupStableDecay:
    """A rate that rises linearly over `warmup_steps`, stays at 1, and falls over the last `decay_steps` of `steps`.

    With s = steps into the cooldown and C = `decay_steps`, the fall is 1 - sqrt(s / C) (arXiv:2512.10858; `sqrt`),
    1 - s / C (`linear`) or (1 + cos(pi s / C)) / 2 (`cosine`). Either part may be 0 steps long.

    Raises:
        ConfigError: a count is negative, or warm-up and cooldown do not fit into the run.
    """

    steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    decay_shape: DecayShape = "sqrt"

    def __post_init__(self) -> None:
        if min(self.steps, self.warmup_steps, self.decay_steps) < 0:
            raise ConfigError(
                f"a schedule counts steps from 0, found steps {self.steps}, warmup_steps {self.warmup_steps}, "
                f"decay_steps {self.decay_steps}"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise ConfigError(
                f"warm-up ({self.warmup_steps} steps) and cooldown ({self.decay_steps} steps) do not fit into a run "
                f"of {self.steps} steps; shorten one of them or train longer"
            )

    @property
    def decay_start(self) -> int | None:
        """Number of steps after which the rate begins to fall, from which other cooldowns can branch; None without."""
        return self.steps - self.decay_steps if self.decay_steps else None

    def factor(self, step: int) -> float:
        """Return the fraction of the peak rate, in [0, 1], for the update that makes `step` into `step` + 1.

        At and after `steps` it is 0 with a cooldown and 1 without one.
        """
        if step < 0:
            raise ValueError(f"steps are counted from 0, got {step}")
        if step < self.warmup_steps:
            return step / self.warmup_steps
        into = step - (self.steps - self.decay_steps)
        if self.decay_steps == 0 or into <= 0:
            return 1.0
        share = min(into / self.decay_steps, 1.0)
        if self.decay_shape == "sqrt":
            return 1.0 - math.sqrt(share)
        if self.decay_shape == "linear":
            return 1.0 - share
        return (1.0 + math.cos(math.pi * share)) / 2


def resolve_decay_steps(cooldown: float, steps: int) -> int:
    """Return the cooldown in steps: a value below 1 is a fraction of `steps` (rounded to the nearest step), else a
    whole count.

    Raises:
        ConfigError: negative, not finite, or above 1 and not whole.
    """
    if not math.isfinite(cooldown) or cooldown < 0:
        raise ConfigError(f"a cooldown is a count of steps or a fraction below 1, found {cooldown}")
    if cooldown < 1:
        return round(cooldown * steps)
    if cooldown != int(cooldown):
        raise ConfigError(f"a cooldown of 1 or more is a whole count of steps, found {cooldown}")
    return int(cooldown)


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
