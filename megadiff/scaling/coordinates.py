"""Expectations of a coordinate check: the bands of its statistics, and what removes each rule of CompleteP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megadiff.scaling.optimum import Band, Size

if TYPE_CHECKING:
    from megadiff.model.initialisation import Role
    from megadiff.run.config import RunConfig

HEAD_DIM, STEPS = 32, 4
"""Width of an attention head, and number of optimizer steps, in all models of the check."""

BANDS = (
    Band("embedding, start", "width", -0.2, 0.2, "the embedding's spread is free of the width"),
    Band("stream, start", "width", -0.25, 0.25, "block matrices are drawn with 1 / sqrt(width)"),
    Band("stream, start", "depth", -0.8, -0.2, "2 L random branches times 4 / L add up to 1 / sqrt(depth)"),
    Band("stream, end", "width", -0.25, 0.25, "activations after some steps are free of the width"),
    Band("stream, end", "depth", -0.5, 0.35, "and do not grow with the depth"),
    Band("change of stream", "width", -0.3, 0.3, "updates move activations alike at every width"),
    Band("change of stream", "depth", -0.35, 0.35, "and at every depth"),
    Band("scores, end", "width", -0.3, 0.3, "attention logits are free of the width"),
    Band("scores, end", "depth", -0.35, 0.35, "and of the depth"),
    Band("logits, step 1", "width", -0.2, 0.2, "the first step moves the logits alike at every width"),
    Band("logits, step 1", "depth", -0.2, 0.2, "and at every depth"),
    Band("logits, end", "width", -0.25, 0.25, "so do later ones"),
    Band("logits, end", "depth", -0.25, 0.25, "so do later ones"),
    Band("change of embedding", "width", -0.25, 0.25, "the embedding learns at a rate free of the width"),
    Band("change of gains", "width", -0.25, 0.25, "the norms' gains learn at a rate free of the width"),
    Band("change of biases", "width", -0.25, 0.25, "the biases learn at a rate free of the width"),
    Band("decay of hidden matrices", "width", -0.1, 0.1, "rate x decay is free of the width"),
    Band("eps / gradient", "width", -0.5, 0.5, "eps keeps to the gradients, which go with 1 / width"),
    Band("eps / gradient", "depth", -0.5, 0.5, "and with 1 / depth"),
)

Edit = Callable[[dict[str, Any], "RunConfig", Size], None]
"""Function that changes one optimizer group of a model, given the smallest size."""


def _lr_as_bulk(group: dict[str, Any], config: RunConfig, base: Size) -> None:
    group["lr"] *= base[0] / config.model.hidden


def _lr_without_width(group: dict[str, Any], config: RunConfig, base: Size) -> None:
    group["lr"] *= config.model.hidden / base[0]


def _decay_without_width(group: dict[str, Any], config: RunConfig, base: Size) -> None:
    group["weight_decay"] *= base[0] / config.model.hidden


def _eps_without_size(group: dict[str, Any], config: RunConfig, base: Size) -> None:
    group["eps"] *= config.model.hidden * config.model.layers / (base[0] * base[1])


OVERRIDES: dict[str, Callable[[int, Size], str]] = {
    "residual": lambda width, base: f"model.resid_scale={4 / base[1]}",
    "head": lambda width, base: f"model.head_scale={512 / base[0]}",
    "hidden_init": lambda width, base: f"model.init_scale={0.4 * (width / base[0]) ** 0.5}",
    "embed_init": lambda width, base: f"model.embed_init={0.02 * (base[0] / width) ** 0.5}",
    "zero_head": lambda width, base: "model.head_init=0.02",
}
"""Rules that a setting removes, given the width and the smallest size."""

EDITS: dict[str, tuple[tuple[Role, ...], Edit]] = {
    "hidden_lr": (("hidden",), _lr_without_width),
    "embed_lr": (("embedding",), _lr_as_bulk),
    "head_lr": (("head",), _lr_as_bulk),
    "gain_lr": (("norm",), _lr_as_bulk),
    "bias_lr": (("bias",), _lr_as_bulk),
    "eps": (("hidden", "embedding", "head", "norm", "bias"), _eps_without_size),
    "decay": (("hidden",), _decay_without_width),
}
"""Rules that are removed by changing the optimizer groups of some roles."""

RULES = (*OVERRIDES, *EDITS)


def bands_of(measured: Mapping[Size, Mapping[str, float]]) -> list[Band]:
    """Return the bands of the statistics that all models have; those of roles that a model lacks are left out."""
    return [band for band in BANDS if all(band.statistic in found for found in measured.values())]


def sizes(widths: Sequence[int], depths: Sequence[int], grid: str) -> list[Size]:
    """Return the (width, depth) pairs of a grid.

    `full` gives all pairs; `cross` gives the smallest depth with all widths and the smallest width with all depths.
    """
    pairs = [(width, depth) for width in widths for depth in depths]
    return [p for p in pairs if grid == "full" or p[0] == min(widths) or p[1] == min(depths)]
