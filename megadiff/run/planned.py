"""A plan's numbers as a run: the layout that fits its GPUs and is fastest, and the run description.

Sizes in bytes are those of `megadiff.model.cost` for local layers, the block of arXiv:2512.10858, bf16 with float32
master weights, and an optimizer with two moments. No torch: a plan is made before anything that trains is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from megadiff.errors import ConfigError
from megadiff.model import cost
from megadiff.scaling.frontier import ModelSize, wasted_by_batch
from megadiff.scaling.goal import Goal, aim, laws_for, sizes
from megadiff.scaling.laws import NEXT_TOKEN, LawBook
from megadiff.scaling.planner import Plan, efficiency_law, plan
from megadiff.train.goodput import best_interval

Recompute = Literal["none", "selective", "full"]

MEMORY_SHARE = 0.85
"""Share of a GPU's memory that the estimate may fill; context, buffers and fragmentation are not part of it."""

PAPER_RUN: dict[str, dict[str, Any]] = {
    "model": {
        "qk_norm": "full",
        "sink": True,
        "softcap": 30,
        "mlp_bias": True,
        "resid_scale": "completep",
        "head_scale": "completep",
    },
    "objective": {"reduction": "sum", "weighting": "surrogate"},
    "conditioning": {"preset": "as_released"},
    "optimizer": {"name": "laprop", "parametrisation": "completep", "eps_calibration": "sum"},
}
"""Settings that the laws were measured with, as in `examples/presets/gidd.yaml`, without defaults."""

_PRECISION = cost.Precision(params="bf16", compute="bf16", master_weights=True, fp32_gradients=True, moments=2)
_MODULES = ("core_attn", "mlp")
_SLOWER: dict[Recompute, float] = {"none": 1.0, "selective": 1.1, "full": 1.33}
_STALL_S, _GPU_BYTES_PER_S = 2.0, 2e9
_GPU_HOURS_BETWEEN_FAILURES = 8192.0
_MOST_NODES = 10


@dataclass(frozen=True)
class PlannedLayout:
    """A layout on a number of ranks, with what it needs."""

    tensor: int
    pipeline: int
    data: int
    micro_batch_size: int
    recompute: Recompute
    bytes_per_rank: int
    """Bytes on the fullest rank, by the closed form unless a dry run corrected them."""
    slowness: float
    """Time relative to a layout without communication, bubbles and recomputation; only for choosing."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    @property
    def batch_multiple(self) -> int:
        """Number of sequences that the batch must be a multiple of."""
        return self.micro_batch_size * self.data


@dataclass(frozen=True)
class PlannedRun:
    """A plan with a layout that fits."""

    plan: Plan
    layout: PlannedLayout
    checkpoint_bytes: int
    """Estimated bytes of one checkpoint."""
    save_steps: int
    """Number of steps between checkpoints."""
    hours: float
    """Hours of training, without restarts and evaluation."""

    @property
    def gpu_hours(self) -> float:
        """Hours of training times GPUs."""
        return self.hours * self.layout.ranks


def planned_run(
    goal: Goal, book: LawBook, *, gpus_per_node: int, excluded: Collection[PlannedLayout] = ()
) -> PlannedRun:
    """Return the plan of the best shape that fits on the GPUs, with the fastest layout.

    Args:
        goal: what is wanted.
        book: the laws.
        gpus_per_node: number of GPUs of a node.
        excluded: layouts that a dry run has found not to fit.

    Raises:
        ConfigError: the goal cannot be reached, or no shape within the tolerance fits on the GPUs.
    """
    assert goal.hardware is not None
    gpu, ranks = goal.hardware.gpu, goal.hardware.number
    if ranks > gpus_per_node and ranks % gpus_per_node:
        raise ConfigError(f"{ranks} GPUs do not fill nodes of {gpus_per_node}; give a multiple, or --gpus-per-node")
    room = MEMORY_SHARE * gpu.memory_bytes
    draft = plan(goal, book)
    choices = sizes(goal, draft.frontier, draft.aim)
    least = math.inf
    for size in choices:
        exact = plan(goal, book, size)
        found = list(_layouts(exact, book, ranks, gpus_per_node))
        least = min([least, *(layout.bytes_per_rank for layout in found)])
        fitting = [layout for layout in found if layout.bytes_per_rank <= room and layout not in excluded]
        if fitting:
            layout = min(fitting, key=lambda each: each.slowness)
            multiple = math.lcm(layout.batch_multiple, goal.batch_multiple)
            return _complete(plan(replace(goal, batch_multiple=multiple), book, size), layout)
    need = "none divides the heads and layers" if least == math.inf else f"the least is {least / 2**30:.3g} GiB a GPU"
    raise ConfigError(
        f"no layout of {choices[0].name} or a shape like it fits on {ranks} {gpu.name} with {room / 2**30:.3g} GiB to "
        f"fill on each ({need}); take more GPUs, or ones with more memory"
    )


def fitting_number(
    goal: Goal, book: LawBook, *, gpus_per_node: int, excluded: Collection[PlannedLayout] = ()
) -> PlannedRun:
    """Return the plan on the smallest number of GPUs that holds the run: a power of two, then whole nodes.

    The arguments are those of `planned_run`.

    Raises:
        ConfigError: the goal cannot be reached, or the run does not fit on the largest number that is tried.
    """
    assert goal.hardware is not None
    numbers = [2**power for power in range(20) if 2**power < gpus_per_node]
    numbers += [gpus_per_node * 2**power for power in range(_MOST_NODES)]
    aim(goal, laws_for(goal, book), 1.0)  # a goal that cannot be reached is refused before anything is tried
    for number in numbers:
        tried = replace(goal, hardware=replace(goal.hardware, number=number))
        try:
            return planned_run(tried, book, gpus_per_node=gpus_per_node, excluded=excluded)
        except ConfigError:
            if number == numbers[-1]:
                raise
    raise AssertionError("the loop returns or raises")


def _layouts(exact: Plan, book: LawBook, ranks: int, gpus_per_node: int) -> Iterator[PlannedLayout]:
    """Yield the layouts of a shape on the ranks, whatever memory they need."""
    size, goal, hyperbola = exact.size, exact.goal, efficiency_law(book, exact.goal.noise)
    wanted = exact.global_batch_size
    for tensor in _divisors(math.gcd(ranks, math.gcd(size.heads, gpus_per_node))):
        for pipeline in _divisors(math.gcd(ranks // tensor, size.layers)):
            data = ranks // (tensor * pipeline)
            for micro in (1, 2, 4, 8, 16):
                multiple = math.lcm(micro * data, goal.batch_multiple)
                batch = max(1, round(wanted / multiple)) * multiple
                waste = wasted_by_batch(batch / wanted, hyperbola)
                if goal.seq_length % tensor or not math.isfinite(waste):
                    continue
                bubble = 1 + (pipeline - 1) / (batch / (micro * data))
                for recompute, slower in _SLOWER.items():
                    slowness = slower * bubble * waste * (1 + 0.05 * math.log2(tensor)) * (1 + 0.05 / micro)
                    layout = PlannedLayout(tensor, pipeline, data, micro, recompute, 0, slowness)
                    yield replace(layout, bytes_per_rank=memory(size, goal, layout).total)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, 64) + 1) if number % divisor == 0]


def shape_of(size: ModelSize, goal: Goal) -> cost.Shape:
    """Return the model's size for closed-form costs."""
    return cost.Shape(
        size.layers,
        size.hidden,
        size.heads,
        goal.vocab_size,
        goal.seq_length,
        qk_norm="full",
        sink=True,
        mlp_bias=True,
        softcap=True,
    )


def memory(size: ModelSize, goal: Goal, layout: PlannedLayout) -> cost.Memory:
    """Return the estimated bytes on the rank that needs most."""
    split = cost.Layout(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        data=layout.data,
        sequence=layout.tensor > 1,
        micro_batch_size=layout.micro_batch_size,
        distributed_optimizer=True,
        recompute_layers=size.layers // layout.pipeline if layout.recompute == "full" else 0,
        recompute_modules=_MODULES if layout.recompute == "selective" else (),
        fused_loss=True,
    )
    return cost.bytes_per_rank(shape_of(size, goal), split, _PRECISION)


def _complete(made: Plan, layout: PlannedLayout) -> PlannedRun:
    hardware = made.goal.hardware
    assert hardware is not None
    whole = cost.bytes_per_rank(shape_of(made.size, made.goal), cost.Layout(), _PRECISION)
    size = whole.parameters + whole.optimizer
    seconds = made.flops("full") / hardware.flops_per_s
    stall = _STALL_S + size / (layout.ranks * _GPU_BYTES_PER_S)
    between = best_interval(stall, _GPU_HOURS_BETWEEN_FAILURES / layout.ranks * 3600)
    save = max(1, min(made.steps, round(between / (seconds / made.steps))))
    return PlannedRun(made, layout, size, _two_digits(save), seconds / 3600)


def _two_digits(count: int) -> int:
    """Return a count with at most two digits that are not zero, and at least 1."""
    scale = 10 ** max(0, len(str(count)) - 2)
    return max(1, count // scale * scale)


def run_tree(run: PlannedRun, *, name: str, with_paper: bool) -> dict[str, Any]:
    """Return the run description as a tree.

    Args:
        run: the plan.
        name: name of the run.
        with_paper: include block, objective, conditioning and optimizer of the paper, and paths of data to be changed;
            otherwise a base file has them.
    """
    made, layout = run.plan, run.layout
    size, goal = made.size, made.goal
    paper = PAPER_RUN if with_paper else {key: {} for key in PAPER_RUN}
    shape = {"layers": size.layers, "hidden": size.hidden, "heads": size.heads, "seq_length": goal.seq_length}
    recompute: dict[str, Any] = {"recompute": layout.recompute}
    if layout.recompute == "selective":
        recompute["recompute_modules"] = list(_MODULES)
    paths = {"train": ["data/train"], "valid": ["data/valid"], "tokenizer": "data/tokenizer"} if with_paper else {}
    tree = {
        "name": name,
        "model": {**shape, **paper["model"]},
        **({"method": {"name": NEXT_TOKEN}} if goal.noise == NEXT_TOKEN else {"noise": {"shift": goal.noise}}),
        "objective": dict(paper["objective"]),
        "conditioning": dict(paper["conditioning"]),
        "data": {**paths, "vocab_size": goal.vocab_size},
        "batch": {"global_batch_size": made.global_batch_size, "micro_batch_size": layout.micro_batch_size},
        "parallel": {
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "sequence": layout.tensor > 1,
            "distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            **recompute,
        },
        "precision": {"compute": "bf16"},
        "optimizer": {**paper["optimizer"], "lr": float(f"{made.learning_rate:.3g}"), "beta2": made.beta2},
        "schedule": {
            "steps": made.steps,
            "warmup_steps": made.warmup_steps,
            "decay_steps": made.decay_steps,
            "decay_shape": "sqrt",
        },
        "checkpoint": {"every": run.save_steps},
    }
    return {key: value for key, value in tree.items() if value != {}}


def description(tree: dict[str, Any], *, comment: list[str], base: str | None) -> str:
    """Return a run description as YAML, with comment lines above it and the name of a base file."""
    lines = [f"# {line}".rstrip() for line in comment]
    lines += [f"base: {yaml.safe_dump(base, default_flow_style=True).splitlines()[0]}"] if base is not None else []
    return "\n".join(lines) + "\n\n" + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)
