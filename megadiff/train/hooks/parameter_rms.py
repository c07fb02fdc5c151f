"""Root mean square of the weights, a curve for each kind of parameter: an example of a hook that runs collectives.

    hooks:
      - {name: parameter_rms, every: 100}

The curves `rms/NAME` are over all layers, so `rms/mlp.linear_fc1.weight` is the root mean square of this matrix in the
whole model. The figures do not depend on the layout but for rounding: every rank adds up its own shards, and a shard
that several ranks hold counts as often in the sum of squares as in the number of entries.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import torch

from megadiff.config.section import Section
from megadiff.train.hooks import Hook, HookContext, StepInfo

_LAYER = re.compile(r"^(chunk \d+ )?(decoder\.layers\.\d+\.)?")


class Settings(Section):
    """Keys of `{name: parameter_rms, ...}`."""

    prefix: str = "rms"
    """Beginning of the names of the curves."""


def build(settings: Any, context: HookContext) -> ParameterRMS:
    """Return the hook of this run."""
    return ParameterRMS(settings.prefix, context)


class ParameterRMS(Hook):
    """The root mean square of each kind of parameter, whenever it is called.

    Args:
        prefix: beginning of the names of the curves.
        context: the run.
    """

    collectives: ClassVar[bool] = True

    def __init__(self, prefix: str, context: HookContext) -> None:
        self._prefix, self._context = prefix, context

    def __call__(self, info: StepInfo) -> None:
        """Write a line with the figures of all kinds. Collective over the run."""
        own: dict[str, tuple[Any, int]] = {}
        with self._context.weights() as weights:
            for name, weight in weights.items():
                kind = _LAYER.sub("", name)
                squares, count = own.get(kind, (0.0, 0))
                own[kind] = squares + weight.double().square().sum(), count + weight.numel()
        sums = torch.stack([squares for squares, _ in own.values()]).tolist()  # the host waits for the device once
        mine = {kind: (total, count) for (kind, (_, count)), total in zip(own.items(), sums, strict=True)}
        self._context.write(self._figures(self._context.topology.gather_to_main(mine) or []), info.step)

    def _figures(self, ranks: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
        """Return the root mean squares from all ranks' (sum of squares, number of entries) by kind."""
        kinds = sorted({kind for found in ranks for kind in found})
        figures = {}
        for kind in kinds:
            parts = [found[kind] for found in ranks if kind in found]
            figures[f"{self._prefix}/{kind}"] = math.sqrt(sum(s for s, _ in parts) / sum(n for _, n in parts))
        return figures
