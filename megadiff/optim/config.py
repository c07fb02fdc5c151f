"""Settings of the optimizer and of the learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megadiff.config.registry import Family
from megadiff.config.section import Section
from megadiff.scaling.flops import FlopCount

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
