"""Check that a parametrisation keeps activations and updates of equal size over widths and depths (CompleteP).

    python tools/coordinate_check.py --output examples/coordinate_check/completep.txt
    python tools/coordinate_check.py --widths 128 256 512 --depths 2 4 8 --grid cross --without hidden_lr   # exits 1

Models of every size take a few optimizer steps on the same sequences. One table shows the measured sizes, a second one
the log-log slopes over width and depth with the band that each must stay in. If one does not, the exit code is 1 and a
sentence explains it.

`--without RULE` keeps one rule at its value for the smallest width and depth instead of scaling it. These are the rules
and the signs by which their absence is noticed:

    residual    4 / L on the branches. Stream and its change grow with depth.
    head        512 / d on the logits. Logits after the first step grow with width; later the loss is so low that
                gradients vanish, and the slope with them.
    hidden_init   0.4 / sqrt(d). The stream at the start grows with width.
    embed_init  0.02, free of d; without: 1 / sqrt(d), as hidden matrices. The embedding at the start shrinks with
    width;
                nothing behind it shows that, because the first norm divides it out.
    zero_head   0. Logits before the first step are not 0.
    hidden_lr     eta / d. The change of the stream grows with width.
    embed_lr, head_lr, gain_lr, bias_lr
                0.02 eta, free of d; without: eta / d, as hidden matrices. The change of the embedding, of the logits,
                of the norms' gains, of the biases shrinks with width. Gains and biases are measured in the parameters
                alone: a few steps of them hardly change the activations.
    eps         1e-8 / (d L). eps over the root mean square of the bulk's gradients grows with both. At the preset's eps
                the ratio is 1e-10, so that no activation can show it.
    decay       weight decay times d. The relative decay of the bulk matrices in the first step, in which their
                gradients are still 0, shrinks with width. The preset's decay is 0; the check sets 0.1.

The factor 0.02 itself, and beta1, beta2, do not scale with size: a coordinate check cannot see them.

Source: arXiv:2512.10858 (CompleteP as used there); the check follows Yang et al., arXiv:2203.03466, appendix D.1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megadiff.config.command_line import SettingsParser, refuse_unknown
from megadiff.config.load import load_config
from megadiff.diffusion.noise_process import NoiseProcess, build_process
from megadiff.diffusion.noising import NoisedBatch, noise_batch
from megadiff.diffusion.objective import gidd_objective
from megadiff.errors import run_command
from megadiff.optim.groups import parameter_groups
from megadiff.optim.member import load_member
from megadiff.optim.rules import Scale
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from megadiff.scaling.slopes import Band, Size, Verdict, judge

with quiet():
    from megadiff.model.denoiser import Denoiser, build_chunks
    from megadiff.model.initialisation import Role, initialise, role_of
    from megadiff.parallel.config import Layout
    from megadiff.parallel.topology import Topology, open_topology, process_group
    from megadiff.platform.machine import Platform, detect

PRESET = Path(__file__).resolve().parent.parent / "examples" / "presets" / "gidd.yaml"
VOCAB, MASK, HEAD_DIM, ROWS, LENGTH, STEPS = 260, 3, 32, 8, 32, 4
SETTINGS = (
    "name=coordinates", "data.train=[sequences-made-here]", "data.tokenizer=byte", f"model.seq_length={LENGTH}",
    f"batch.global_batch_size={ROWS}", f"batch.micro_batch_size={ROWS}", "schedule.steps=100000",
    "precision.compute=fp32", "optimizer.lr=0.1", "optimizer.weight_decay=0.1",
)  # fmt: skip
"""Settings common to all models of the check, applied before the overrides of the command line."""

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

Edit = Callable[[dict[str, Any], RunConfig, Size], None]
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


def sizes(widths: Sequence[int], depths: Sequence[int], grid: str) -> list[Size]:
    """Return the (width, depth) pairs of a grid.

    `full` gives all pairs; `cross` gives the smallest depth with all widths and the smallest width with all depths.
    """
    pairs = [(width, depth) for width in widths for depth in depths]
    return [p for p in pairs if grid == "full" or p[0] == min(widths) or p[1] == min(depths)]


def check(
    grid: Sequence[Size], *, without: str | None = None, config: Path = PRESET, overrides: Sequence[str] = ()
) -> tuple[dict[Size, dict[str, float]], list[str]]:
    """Measure every size in one open process group; return the statistics and a sentence for each violated
    property."""
    base = (min(width for width, _ in grid), min(depth for _, depth in grid))
    platform = detect("cpu")
    topology = open_topology(Layout(1, 1, 1, 1, 1))
    measured = {}
    for width, depth in grid:
        removed = [OVERRIDES[without](width, base)] if without in OVERRIDES else []
        size = (f"model.hidden={width}", f"model.layers={depth}", f"model.heads={max(1, width // HEAD_DIM)}")
        settings = load_config(config, [*SETTINGS, *overrides, *size, *removed], RunConfig)
        roles, edit = EDITS.get(without or "", ((), None))
        model = _model(settings, platform, topology)
        groups = _groups(model, settings)
        for role in roles:
            assert edit is not None
            edit(groups[role], settings, base)
        measured[width, depth] = _measure(model, groups, settings)
    broken = [verdict.sentence() for verdict in judge(measured, BANDS) if not verdict.holds]
    broken += [
        f"logits before the first step have size {found['logits, start']:.3g} at width {width}, depth {depth}: "
        "the head starts at 0, so that the first prediction is uniform"
        for (width, depth), found in measured.items()
        if found["logits, start"] > 0
    ][:1]
    return measured, broken


def _model(config: RunConfig, platform: Platform, topology: Topology) -> Denoiser:
    with quiet():
        chunks = build_chunks(
            config.model,
            vocab_size=VOCAB,
            parallel=config.parallel,
            precision=config.precision,
            platform=platform,
            topology=topology,
        )
    initialise(chunks, config.model, seed=config.seed, topology=topology)
    return chunks[0]


def _groups(model: Denoiser, config: RunConfig) -> dict[Role, dict[str, Any]]:
    """Return the run's own parameter groups, but one per role."""
    scale = Scale(config.model.hidden, config.model.layers, config.tokens_per_step, config.objective.reduction)
    by_role: dict[Role, list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        by_role.setdefault(role_of(name), []).append((role_of(name), parameter))
    return {
        role: next(group for group in parameter_groups(pairs, config.optimizer, scale) if group["params"])
        for role, pairs in by_role.items()
    }


def _measure(model: Denoiser, groups: dict[Role, dict[str, Any]], config: RunConfig) -> dict[str, float]:
    """`STEPS` optimizer steps on one batch, and what they did."""
    process = build_process(config.noise, vocab_size=VOCAB, mask_id=MASK)
    sequences = noise_batch(
        _walks(), seed=0, sample_index=np.arange(ROWS), process=process, stratified=True, global_batch=ROWS
    )
    optimizer = load_member(config.optimizer.name).build(list(groups.values()), config.optimizer)
    begin = {role: [p.detach().clone() for p in group["params"]] for role, group in groups.items()}
    found: dict[str, float] = {}
    start: dict[str, list[Tensor]] = {}
    for step in range(STEPS + 1):
        with _watched(model) as seen:
            logits = model(sequences.noised)[..., :VOCAB]
        seen["logits"] = [logits.detach().clone()]
        if step == 0:
            start = dict(seen)
            found.update({f"{name}, start": _size(value) for name, value in seen.items()})
        if step == 1:
            found["logits, step 1"] = _size(seen["logits"])
            found["decay of hidden matrices"] = _size(_moved(groups["hidden"]["params"], begin["hidden"])) / _size(
                begin["hidden"]
            )
        optimizer.zero_grad()
        _loss(logits, sequences, process).backward()
        if step < STEPS:
            optimizer.step()
    found.update({f"{name}, end": _size(value) for name, value in seen.items()})
    found.update({f"change of {name}": _size(_moved(seen[name], start[name])) for name in ("stream", "scores")})
    seen_roles: dict[str, Role] = {"embedding": "embedding", "gains": "norm", "biases": "bias"}
    for name, role in seen_roles.items():
        found[f"change of {name}"] = _size(_moved(groups[role]["params"], begin[role]))
    gradients = [p.grad for p in groups["hidden"]["params"] if p.grad is not None]
    found["eps / gradient"] = groups["hidden"]["eps"] / _size(gradients)
    return found


def _walks() -> np.ndarray:
    """Return clean sequences in which a token depends on the previous one: they can be learned, and gradients agree."""
    draw = np.random.default_rng(0)
    first, steps = draw.integers(0, 50, size=(ROWS, 1)), draw.integers(1, 4, size=(ROWS, LENGTH))
    return 4 + (first + np.cumsum(steps, axis=1)) % 50


def _loss(logits: Tensor, sequences: NoisedBatch, process: NoiseProcess) -> Tensor:
    terms = gidd_objective(logits.transpose(0, 1), sequences.clean, sequences.noised, sequences.log_snr, mixing=process)
    return terms.loss.sum()


@contextmanager
def _watched(model: Denoiser) -> Iterator[dict[str, list[Tensor]]]:
    """Record the embedding output, the residual stream after the last block and the attention logits of a
    forward pass."""
    seen: dict[str, list[Tensor]] = {"embedding": [], "stream": [], "scores": []}

    def scores(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        query, key = inputs[0].detach(), inputs[1].detach()
        seen["scores"].append(torch.einsum("qbhd,kbhd->bhqk", query, key) / query.shape[-1] ** 0.5)

    layers: Any = model.decoder.layers
    hooks = [
        model.embedding.register_forward_hook(lambda module, inputs, output: seen["embedding"].append(output.detach())),
        layers[-1].register_forward_hook(lambda module, inputs, output: seen["stream"].append(output[0].detach())),
        *(layer.self_attention.core_attention.register_forward_hook(scores) for layer in layers),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _moved(now: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
    return [a.detach() - b for a, b in zip(now, before, strict=True)]


def _size(tensors: Sequence[Tensor]) -> float:
    """Return the root mean square over all entries."""
    total = sum(float(x.detach().double().square().sum()) for x in tensors)
    return (total / sum(x.numel() for x in tensors)) ** 0.5


def report(measured: Mapping[Size, Mapping[str, float]], verdicts: Sequence[Verdict], console: Console) -> None:
    """Print two tables: the measured sizes, and the slopes."""
    grid = list(measured)
    table = Table(title=f"root mean squares; end: after {STEPS} steps, change: against the start")
    for name in ("statistic", *(f"d{width} L{depth}" for width, depth in grid)):
        table.add_column(name, justify="left" if name == "statistic" else "right", no_wrap=True)
    for name in measured[grid[0]]:
        table.add_row(name, *(f"{measured[size][name]:.3g}" for size in grid))
    console.print(table)
    slopes = Table(title="log-log slopes: the line nearest to its band's edge")
    for name in ("statistic", "over", "slope", "band", "lines", ""):
        slopes.add_column(name, no_wrap=True)
    for verdict in verdicts:
        band = verdict.band
        found = (f"{verdict.worst.slope:+.2f}", f"{band.low:+.2f} .. {band.high:+.2f}", str(verdict.lines))
        slopes.add_row(band.statistic, band.axis, *found, "" if verdict.holds else "BROKEN")
    console.print(slopes)


def main() -> None:
    """Parse the command line, measure, print the tables, and report the properties that do not hold."""
    parser = SettingsParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=PRESET, help="run description to check (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024], help=f"multiples of {HEAD_DIM}")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--grid", choices=("full", "cross"), default="full", help="all pairs, or one line each")
    parser.add_argument("--without", choices=RULES, metavar="RULE", help=f"remove one rule: {', '.join(RULES)}")
    parser.add_argument("--output", type=Path, help="file to write the tables to as well")
    arguments = parser.parse_with_settings()
    refuse_unknown(arguments, RunConfig)
    torch.set_num_threads(1)
    platform = detect("cpu")
    platform.prepare_megatron()
    started = time.monotonic()
    grid = sizes(arguments.widths, arguments.depths, arguments.grid)
    with process_group(platform, alone=True):
        measured, broken = check(
            grid, without=arguments.without, config=arguments.config, overrides=arguments.overrides
        )
    console = Console(record=arguments.output is not None, width=40 + 10 * len(grid))
    report(measured, judge(measured, BANDS), console)
    console.print("\n".join(broken) or "every promise is kept", soft_wrap=True)
    print(f"{len(grid)} models in {time.monotonic() - started:.0f} s")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(console.export_text(), encoding="utf-8")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
