"""Plan a run from a budget and scaling laws, and write its run description.

Give one or two of a budget (FLOPs, or GPUs and hours), the tokens at hand, a model size and a loss to reach. The laws
are those of arXiv:2512.10858 unless --laws names a file of your own. Everything is an estimate: the output names each
extrapolation, and what each bound costs in loss.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from megadiff.config.command_line import CommandParser
from megadiff.errors import ConfigError
from megadiff.platform.gpus import DEFAULT_GPU, DEFAULT_MFU, check_mfu

if TYPE_CHECKING:
    from megadiff.run.config import RunConfig
    from megadiff.run.planned import PlannedLayout, PlannedRun
    from megadiff.scaling.goal import Goal
    from megadiff.scaling.laws import LawBook
    from megadiff.scaling.planner import Plan

_EPILOG = """examples:
  megadiff plan --flops 1e20                                     # all five noises, as a table
  megadiff plan --flops 1e20 --noise masked --gpu h100 --gpus 64 --output plan.yaml
  megadiff plan --noise uniform --gpu h100 --gpus 128 --hours 100 --mfu 0.4 --tokens 5e10
  megadiff plan --noise uniform --loss 2.5 --layers 24 --hidden 2048
  megadiff plan --noise masked --flops 1e21 --laws runs/sweep/laws.yaml
"""
_COUNTS = ("deepseek", "chinchilla", "full")
_WIDE = 512
"""Width from which models are for GPUs, whose heads have 64 or 128 features."""
_SAME_SIZE = 0.02
"""Relative difference of parameters below which a base file's model is that of the plan."""
_LONGEST_HOURS = 24
_DRY_RUN_S = 180.0
"""Seconds after which a dry run is given up, and the closed form is taken; it takes about ten on an idle machine."""
_MOST_TRIED = 4
"""Number of layouts that dry runs may reject before the plan is given up."""


def main() -> None:
    """Read the command line, plan, print, and write the run description."""
    arguments = _arguments()
    if arguments.output is not None:
        _check_output(arguments)
    from megadiff.scaling.laws import known_noise, law_book

    book = law_book(arguments.laws)
    if arguments.noise == "all":
        if arguments.output is not None:
            raise ConfigError("--output writes one run; give its noise with --noise")
        print("\n".join(_table(arguments, book)))
        return
    from megadiff.run.planned import fitting_number, planned_run

    goal = _goal(arguments, known_noise(arguments.noise, book.plannable))
    make = fitting_number if arguments.gpus is None else planned_run

    def planned(excluded: Collection[PlannedLayout]) -> PlannedRun:
        return make(goal, book, gpus_per_node=arguments.gpus_per_node, excluded=excluded)

    run, source = planned(()), "closed form; --output tries it by a dry run"
    if arguments.output is not None:
        run, source = _confirmed(arguments, run, planned)
    print("\n".join(_lines(arguments, run, book, source)))
    if arguments.output is not None:
        _write(arguments, run)
        print(f"written           {arguments.output}")
    print(f"submit            {_submit(arguments, run)}")


def _confirmed(
    arguments: argparse.Namespace, run: PlannedRun, planned: Callable[[Collection[PlannedLayout]], PlannedRun]
) -> tuple[PlannedRun, str]:
    """Return the plan whose layout fits by a dry run, and the source of its memory in words.

    Args:
        arguments: the command line.
        run: the plan by the closed form.
        planned: function that plans without some layouts.

    Raises:
        ConfigError: a dry run refuses the run, or no layout fits.
    """
    from megadiff.run.dry_runs import Refused, dry_runs
    from megadiff.run.planned import MEMORY_SHARE

    excluded: list[PlannedLayout] = []
    while True:
        hardware = run.plan.goal.hardware
        assert hardware is not None
        room = MEMORY_SHARE * hardware.gpu.memory_bytes
        config = _config(arguments, run)
        _compare(config, run)
        answers = dry_runs([(config, run.layout.ranks)], limit_s=_DRY_RUN_S)
        if answers is None:
            return run, "closed form, as the dry run gave no answer"
        (found,) = answers
        if isinstance(found, Refused):
            hint = " (here with --vocab-size)" if found.sentence.startswith("data.vocab_size") else ""
            raise ConfigError(f"a dry run refuses the planned run: {found.sentence}{hint}")
        if found.total_bytes <= room:
            layout = replace(run.layout, bytes_per_rank=found.total_bytes)
            return replace(run, layout=layout), f"dry run of rank {found.rank}"
        excluded.append(run.layout)
        if len(excluded) == _MOST_TRIED:
            raise ConfigError(
                f"by dry runs none of the {_MOST_TRIED} fastest layouts fits, though the closed form says so: the last "
                f"needs {found.total_bytes / 2**30:.3g} GiB of the {room / 2**30:.3g} GiB to fill on a "
                f"{hardware.gpu.name}; take more GPUs, or ones with more memory"
            )
        run = planned(excluded)


def _config(arguments: argparse.Namespace, run: PlannedRun) -> RunConfig:
    """Return the planned run as a configuration, with local layers."""
    from megadiff.config.load import load_config
    from megadiff.run.config import RunConfig
    from megadiff.run.planned import description, run_tree

    base = None if arguments.base is None else str(arguments.base.resolve())
    tree = run_tree(run, name="plan", with_paper=base is None)
    with TemporaryDirectory() as folder:
        path = Path(folder, "plan.yaml")
        path.write_text(description(tree, comment=[], base=base), encoding="utf-8")
        return load_config(path, ["transformer_impl=local"], RunConfig)


def _arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--noise", default="all", help="masked, low_uniform, balanced, high_uniform, uniform, or all")
    goal = parser.add_argument_group("goal, of which one or two")
    goal.add_argument("--flops", type=float, metavar="C", help="training FLOPs of the run")
    goal.add_argument("--hours", type=float, metavar="H", help="hours on the GPUs of --gpu and --gpus")
    goal.add_argument("--tokens", type=float, metavar="D", help="different tokens at hand")
    goal.add_argument("--params", type=float, metavar="P", help="parameters without embedding and head")
    goal.add_argument("--layers", type=int, metavar="L", help="exact shape, with --hidden")
    goal.add_argument("--hidden", type=int, metavar="W", help="exact shape, with --layers")
    goal.add_argument("--loss", type=float, metavar="NATS", help="ELBO to reach after the cooldown, in nats per token")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--gpu", default=DEFAULT_GPU, metavar="NAME", help="kind of GPU (default: %(default)s)")
    machine.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: the fewest that hold the run)")
    machine.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="default: %(default)s")
    machine.add_argument("--mfu", type=float, default=DEFAULT_MFU, help="share of the peak (default: %(default)s)")
    model = parser.add_argument_group("laws and model")
    model.add_argument("--laws", type=Path, metavar="FILE", help="law file of your own, before the published laws")
    model.add_argument(
        "--flop-count", choices=("deepseek", "chinchilla", "full"), default="deepseek", help="of --flops"
    )
    model.add_argument("--seq-length", type=int, default=2048, metavar="S", help="default: %(default)s")
    model.add_argument("--vocab-size", type=int, default=131_072, metavar="V", help="default: %(default)s")
    model.add_argument(
        "--within", type=float, default=0.25, metavar="PERCENT", help="loss that a shape may cost (default: 0.25)"
    )
    bounds = parser.add_argument_group("bounds and rounding")
    bounds.add_argument(
        "--max-epochs", type=float, default=4.0, metavar="E", help="passes through --tokens (default: 4)"
    )
    bounds.add_argument("--max-batch", type=int, metavar="B", help="largest batch, in sequences")
    bounds.add_argument("--max-learning-rate", type=float, metavar="ETA", help="largest base learning rate")
    bounds.add_argument(
        "--batch-law", default="vertex", metavar="NAME", help="vertex, or sizing: the one of the 10B run"
    )
    bounds.add_argument("--batch-multiple", type=int, default=1, metavar="B", help="sequences to round the batch to")
    bounds.add_argument("--step-multiple", type=int, default=1, metavar="S", help="steps to round the run up to")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="FILE", help="run description to write")
    output.add_argument("--base", type=Path, metavar="FILE", help="run description that the written one builds on")
    output.add_argument("--name", help="name of the run (default: from noise, shape and budget)")
    return _checked(parser.parse_args())


def _checked(arguments: argparse.Namespace) -> argparse.Namespace:
    if (arguments.layers is None) != (arguments.hidden is None):
        raise ConfigError("--layers and --hidden go together; give both, or --params for a size without a shape")
    if arguments.layers is not None and arguments.params is not None:
        raise ConfigError("--params and --layers with --hidden are both model sizes; leave one out")
    if arguments.hours is not None and arguments.gpus is None:
        raise ConfigError("--hours is a budget only with a number of GPUs; give --gpus too")
    for name in ("gpus", "gpus_per_node", "layers", "hidden", "hours", "seq_length", "vocab_size", "within", "mfu"):
        _check_positive(name, getattr(arguments, name))
    for name in ("max_epochs", "max_batch", "max_learning_rate", "batch_multiple", "step_multiple"):
        _check_positive(name, getattr(arguments, name))
    check_mfu(arguments.mfu)
    if (hidden := arguments.hidden) is not None and (hidden % 2 or (hidden >= _WIDE and hidden % 64)):
        raise ConfigError(f"--hidden must be even, and from {_WIDE} on a multiple of 64, found {hidden}")
    return arguments


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"--{name.replace('_', '-')} must be above 0, found {value:g}")


def _check_output(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--output {output}: a name that ends in .yaml is wanted")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}; make it, or name another one")
    if output.is_dir():
        raise ConfigError(f"--output {output}: this is a folder; name a file")


def _goal(arguments: argparse.Namespace, noise: str) -> Goal:
    from megadiff.platform.gpus import gpu
    from megadiff.scaling.frontier import ModelSize
    from megadiff.scaling.goal import Goal, Hardware, check_goal

    hardware = Hardware(gpu(arguments.gpu), arguments.gpus or 1, arguments.mfu, arguments.hours)
    size = None if arguments.layers is None else ModelSize(arguments.layers, arguments.hidden)
    goal = Goal(
        noise=noise,
        flops=arguments.flops,
        hardware=hardware,
        tokens=arguments.tokens,
        params=arguments.params,
        loss=arguments.loss,
        size=size,
        flop_count=arguments.flop_count,
        seq_length=arguments.seq_length,
        vocab_size=arguments.vocab_size,
        tolerance=arguments.within / 100,
        max_epochs=arguments.max_epochs,
        batch_estimator=arguments.batch_law,
        batch_multiple=arguments.batch_multiple,
        step_multiple=arguments.step_multiple,
        max_batch=arguments.max_batch,
        max_learning_rate=arguments.max_learning_rate,
    )
    check_goal(goal)
    return goal


def _table(arguments: argparse.Namespace, book: LawBook) -> Iterator[str]:
    """Yield a table with the laws' own numbers for every noise, before any rounding."""
    from megadiff.scaling.goal import aim, annealing_ratio, laws_for
    from megadiff.scaling.laws import extrapolations, optimal_batch_tokens, optimal_learning_rate
    from megadiff.scaling.planner import law_remarks

    heads = ("FLOPs", "M*", "D*", "L*", "after cooldown", "B* tokens", "sequences", "eta*", "steps")
    widths = (10, 10, 10, 7, 16, 11, 11, 6, 9)

    def row(noise: str, cells: Sequence[str]) -> str:
        return f"{noise:13}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    yield row("noise", heads)
    outside: dict[str, str] = {}
    remarks: dict[str, None] = {}
    for noise in book.noises:
        goal = _goal(arguments, noise)
        laws, ratio = laws_for(goal, book), annealing_ratio(book, noise)
        found = aim(goal, laws, ratio)
        size, tokens = laws.best_size(found.flops), laws.best_tokens(found.flops)
        loss = laws.best_loss(found.flops)
        if goal.wanted_size is not None or goal.tokens is not None or goal.loss is not None:
            size, tokens = found.size, found.tokens
            loss = laws.loss(size, tokens)
        batch = optimal_batch_tokens(tokens, noise=noise, laws=book, estimator=arguments.batch_law)
        rate = optimal_learning_rate(batch, noise=noise, laws=book)
        cells = (
            *(f"{found.flops:.3g}", f"{size:.3g}", f"{tokens:.3g}", f"{loss:.3f}", f"{loss / ratio:.3f}"),
            *(f"{batch:.3g}", f"{batch / goal.seq_length:,.0f}", f"{rate:.2f}", f"{tokens / batch:,.0f}"),
        )
        yield row(noise, cells)
        reached = {"flops": found.flops, "batch_tokens": batch, "learning_rate": rate}
        reached |= {"seq_length": goal.seq_length, "vocab_size": goal.vocab_size}
        for name, phrase in extrapolations([laws.loss_law], reached).items():
            outside.setdefault(name, f"{phrase} ({noise})")
        remarks |= dict.fromkeys(law_remarks(book, laws, arguments.batch_law))
    yield ""
    yield "M* FLOPs per token and FLOPs by the count of the laws; L* is the ELBO in nats per token before the cooldown."
    for phrase in outside.values():
        yield f"extrapolated      {phrase}"
    for sentence in remarks:
        yield f"remark            {sentence}"


def _lines(arguments: argparse.Namespace, run: PlannedRun, book: LawBook, source: str) -> Iterator[str]:
    """Yield the plan's lines."""
    made, layout = run.plan, run.layout
    goal, size = made.goal, made.size
    yield f"goal              {_goal_words(goal)}"
    yield from _optimum_lines(made, book)
    heads, off = f"{size.heads} heads of {size.hidden // size.heads}", f"{100 * made.size_cost:.3f} %"
    yield (
        f"shape             {size.name}: {size.layers} layers of width {size.hidden:,}, {heads}; {size.params:,} "
        f"parameters without embedding and head; {off} of the loss off the optimum"
    )
    yield f"FLOPs per token   {', '.join(f'{count} {made.flops_per_token(count):.5g}' for count in _COUNTS)}"
    yield f"FLOPs             {', '.join(f'{count} {made.flops(count):.4g}' for count in _COUNTS)}"
    epochs = "" if made.epochs is None else f", {made.epochs:.3g} epochs of the {goal.tokens:.3g} at hand"
    yield f"run               {made.steps:,} steps, {made.tokens:,} tokens{epochs}"
    by_law = f"{made.batch_wanted / goal.seq_length:,.0f}"
    yield (
        f"batch             {made.global_batch_size:,} sequences of {goal.seq_length:,}, {made.batch_tokens:,} tokens; "
        f"{by_law} sequences by the law"
    )
    yield (
        f"learning rate     {made.learning_rate:.3g} (CompleteP's base rate), beta2 {made.beta2:g}, warm-up "
        f"{made.warmup_steps:,} steps, cooldown over the last {made.decay_steps:,}"
    )
    yield from _loss_lines(made, book)
    yield from _machine_lines(arguments, run, source)
    for bound in made.bounds:
        yield f"bound             {bound.what}; costs {100 * bound.cost:.3f} % of the loss"
    for phrase in made.extrapolations:
        yield f"extrapolated      {phrase}"
    for sentence in made.remarks:
        yield f"remark            {sentence}"
    if layout.recompute != "none":
        yield f"remark            {layout.recompute} recomputation lowers the utilisation that can be reached"


def _goal_words(goal: Goal) -> str:
    words = [f"{goal.noise} noise"]
    if goal.budget is not None:
        budget, count = goal.budget
        words.append(f"{budget:.3g} FLOPs (count {count})")
    if goal.tokens is not None:
        words.append(f"{goal.tokens:.3g} tokens at hand")
    if goal.size is not None:
        words.append(f"shape {goal.size.name}")
    if goal.params is not None:
        words.append(f"{goal.params:.3g} parameters")
    if goal.loss is not None:
        words.append(f"loss {goal.loss:g} after the cooldown")
    return ", ".join(words)


def _optimum_lines(made: Plan, book: LawBook) -> Iterator[str]:
    """Yield the laws' own numbers for the budget, and the range of sizes."""
    from megadiff.scaling.goal import size_range
    from megadiff.scaling.laws import LawBook

    laws, flops = made.frontier, made.aim.flops
    own = LawBook((book.file_of(laws.loss_law),))
    params = own.law("params", noise=laws.noise, flop_count=laws.flop_count)
    counted = "" if params is None or laws.size_law is None else f", P* {params.value(flops):.3g} parameters"
    tokens, loss = laws.best_tokens(flops), laws.best_loss(flops)
    yield (
        f"optimum           of {flops:.3g} FLOPs ({laws.flop_count}): M* {laws.best_size(flops):.3g} FLOPs per token, "
        f"D* {tokens:.3g} tokens{counted}, L* {loss:.3f}, {loss / made.annealing_ratio:.3f} after a cooldown"
    )
    low, high = size_range(made.goal, laws, made.aim)
    ends = [f"{made.size.params * end / made.law_size:.2g}" for end in (low, high)]
    within = f"within {100 * made.goal.tolerance:g} % of the loss"
    yield (
        f"sizes             {within}: {low:.3g} to {high:.3g} FLOPs per token, about {ends[0]} to {ends[1]} parameters"
    )


def _loss_lines(made: Plan, book: LawBook) -> Iterator[str]:
    """Yield the expected loss by the laws and, where there is one, by the surface fit of the same runs."""
    interval, ratio = made.interval(), made.annealing_ratio
    before = f"{made.loss:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
    after = f"{made.annealed_loss:.3f}" + (
        "" if interval is None else f" [{interval[0] / ratio:.3f}, {interval[1] / ratio:.3f}]"
    )
    law = made.frontier.loss_law
    source = "exponent alone" if law.draws is None and law.covariance is None else "fit"
    runs = "" if book.file_of(law).runs else ", without differences from run to run"
    level = f"; {100 * law.confidence:g} % interval of the {source}{runs}"
    level = "" if interval is None else level
    yield f"loss              {before} nats per token before the cooldown, {after} after it{level}"
    if (other := made.second_method(book)) is not None:
        expected = other.loss(made.law_size, made.tokens)
        yield (
            f"second method     the surface fit expects {expected:.3f} before the cooldown, and its optimum at M "
            f"{other.best_size(made.aim.flops):.3g}"
        )


def _machine_lines(arguments: argparse.Namespace, run: PlannedRun, source: str) -> Iterator[str]:
    made, layout = run.plan, run.layout
    hardware = made.goal.hardware
    assert hardware is not None
    number = f"{layout.ranks} x {hardware.gpu.name}"
    fewest = " (the fewest that hold the run)" if arguments.gpus is None else ""
    split = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    yield (
        f"layout            {number}{fewest}: {split}, "
        f"microbatches of {layout.micro_batch_size}, recomputation {layout.recompute}"
    )
    needs, has = (f"{count / 2**30:.3g} GiB" for count in (layout.bytes_per_rank, hardware.gpu.memory_bytes))
    yield f"memory            about {needs} of {has} on the fullest GPU ({source}, local layers)"
    peak = f"{hardware.gpu.peak_flops / 1e12:,.0f} TFLOP/s"
    share = f"{100 * hardware.utilisation:g} %"
    yield f"time              {run.hours:,.1f} hours, {run.gpu_hours:,.0f} GPU hours, at {share} of {peak}"
    yield (
        f"checkpoint        {run.checkpoint_bytes / 2**30:.3g} GiB, every {run.save_steps:,} steps, which suits a "
        "failure every 8,192 GPU hours"
    )


def _write(arguments: argparse.Namespace, run: PlannedRun) -> None:
    """Write the run description, and check that it reads and can be laid out."""
    from megadiff.files import write_atomically
    from megadiff.run.planned import description, run_tree

    output, base = arguments.output, arguments.base
    made = run.plan
    name = arguments.name or f"{made.goal.noise}-{made.size.name.lower()}-{made.aim.flops:.2g}".replace("+", "")
    comment = [
        f"megadiff plan {shlex.join(sys.argv[1:])}",
        f"Expected ELBO: {made.annealed_loss:.3f} nats per token after the cooldown, {made.loss:.3f} before it; "
        f"{made.flops('deepseek'):.3g} FLOPs (deepseek), {run.layout.ranks} GPUs, {run.hours:,.1f} hours.",
        *(f"Extrapolated: {phrase}." for phrase in made.extrapolations),
    ]
    above = None if base is None else os.path.relpath(base.resolve(), output.parent.resolve())
    text = description(run_tree(run, name=name, with_paper=base is None), comment=comment, base=above)
    from megadiff.config.load import load_config
    from megadiff.run.config import RunConfig

    draft = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")  # beside it, where its base is found
    try:
        write_atomically(draft, text)
        config = load_config(draft, [], RunConfig)
        config.layout(world_size=run.layout.ranks, vocab_size=made.goal.vocab_size)
        draft.replace(output)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--output {output} cannot be written ({reason}); name another one") from None
    finally:
        draft.unlink(missing_ok=True)


def _compare(config: RunConfig, run: PlannedRun) -> None:
    """Refuse a base file whose model or learning rates are not those that the laws speak of.

    Raises:
        ConfigError: the model has another number of parameters, or the rate is no base rate of CompleteP.
    """
    from megadiff.model import cost
    from megadiff.run.planned import shape_of

    made = run.plan
    vocab_size = made.goal.vocab_size
    shapes = (shape_of(made.size, made.goal), config.shape(vocab_size=vocab_size))
    planned, found = (cost.parameters(shape).non_embedding for shape in shapes)
    if abs(found / planned - 1) > _SAME_SIZE:
        raise ConfigError(
            f"with the model of --base the run has {found:,} parameters, not the {planned:,} that were planned: the "
            "laws are of the paper's block; leave out model.mlp, kv_heads, head_dim and ffn_hidden of the base file"
        )
    if config.optimizer.parametrisation != "completep":
        raise ConfigError(
            f"--base sets optimizer.parametrisation={config.optimizer.parametrisation}, but the planned learning rate "
            "is a base rate of completep; set that"
        )


def _submit(arguments: argparse.Namespace, run: PlannedRun) -> str:
    """Return the command that submits the run, in jobs of a day at most, which continue each other."""
    per_node = min(arguments.gpus_per_node, run.layout.ranks)
    hours = min(_LONGEST_HOURS, math.ceil(run.hours * 1.1 + 0.5))
    config = shlex.quote(str(arguments.output or "plan.yaml"))
    nodes = run.layout.ranks // per_node
    return f"slurm/submit pretrain --config {config} --nodes {nodes} --gpus-per-node {per_node} --time {hours}:00:00"
