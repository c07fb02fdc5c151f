"""Learning rate as a function of the step: linear warm-up, constant, cooldown.

Steps are counted from 0: `factor(s)` scales the update that makes step s into step s + 1, s in [0, steps). So the very
first update of a warmed-up run has rate 0 and the last one of a cooled-down run a rate just above 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megadiff.errors import ConfigError

DecayShape = Literal["sqrt", "linear", "cosine"]


@dataclass(frozen=True)
class WarmupStableDecay:
    """Rises linearly over `warmup_steps`, stays at 1, and falls over the last `decay_steps` of `steps`.

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
