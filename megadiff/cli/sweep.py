"""Write, train and watch the runs of a scaling sweep, and predict its cost and power.

A description (YAML) names noises, model sizes, budgets, batches, learning rates and seeds. `write` makes run
descriptions of it, and the rows that `slurm/submit sweep` takes; `run --local` trains here, in warm processes that
survive what happens to one run; `status` shows how far a sweep has come. With --dry-run, cost and statistical power are
printed and nothing is done.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megadiff.config.command_line import CommandParser
from megadiff.errors import ConfigError
from megadiff.platform.gpus import DEFAULT_GPU, DEFAULT_MFU, check_mfu

if TYPE_CHECKING:
    from megadiff.run.sweep_folder import RunState, SweepPlan
    from megadiff.scaling.power import SweepPower

_EPILOG = """examples:
  megadiff sweep write examples/scaling/paper.yaml --dry-run --gpu h100 --run-noise 0.001
  megadiff sweep write my-sweep.yaml --output runs/my-sweep        # then slurm/submit sweep, as it prints
  megadiff sweep run examples/scaling/mini.yaml --local --jobs 2   # the same command goes on after Ctrl-C or a kill
  megadiff sweep run runs/mini --local                             # goes on with a written sweep, too
  megadiff sweep status runs/mini

`megadiff sweep write --help` shows the options of one of them.
"""
_ACTIONS = {
    "write": "Write run descriptions and the rows of slurm/submit sweep.",
    "run": "Train the runs on this machine.",
    "status": "Show which runs are done, running, failed, diverged or missing.",
}
_DEFAULT_NOISE = 0.002


def main() -> None:
    """Read the command line and do what its first word names."""
    top = CommandParser(description=__doc__, epilog=_EPILOG, usage="%(prog)s [-h] {write,run,status} ...")
    top.add_argument("action", choices=_ACTIONS, help="what to do")
    action = top.parse_args(sys.argv[1:2]).action
    arguments = _parser(action, top.prog).parse_intermixed_args(sys.argv[2:])
    if action == "status":
        _status(_folder_of(arguments.folder), shows_all=arguments.all)
        return
    if arguments.description.is_dir():
        _go_on(arguments, action)
        return
    plan = _plan(arguments)
    if arguments.dry_run:
        print("\n".join(_dry_run(arguments, plan)))
    elif action == "write":
        _write(plan)
    else:
        _start(arguments, plan)


def _parser(action: str, prog: str) -> CommandParser:
    parser = CommandParser(prog=f"{prog} {action}", description=_ACTIONS[action])
    if action == "status":
        parser.add_argument("folder", type=Path, help="the sweep's folder, or its YAML file")
        parser.add_argument("--all", action="store_true", help="show finished and missing runs one by one too")
        return parser
    or_folder = "; or the folder of a written sweep, to go on with it" if action == "run" else ""
    parser.add_argument("description", type=Path, help=f"the sweep's YAML file{or_folder}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the description's")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder of the sweep (default: output_dir/name)")
    if action == "run":
        parser.add_argument("--local", action="store_true", help="train on this machine")
        parser.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default: one a core)")
    dry = parser.add_argument_group("before anything is done")
    dry.add_argument("--dry-run", action="store_true", help="print runs, cost and power, and do nothing")
    dry.add_argument("--gpu", default=DEFAULT_GPU, metavar="NAME", help="kind of GPU (default: %(default)s)")
    dry.add_argument("--mfu", type=float, default=DEFAULT_MFU, help="share of its peak (default: %(default)s)")
    dry.add_argument(
        "--run-noise", type=float, default=_DEFAULT_NOISE, metavar="SD",
        help="standard deviation of log loss between seeds (default: %(default)s)",
    )  # fmt: skip
    dry.add_argument("--draws", type=int, default=400, metavar="N", help="simulated sweeps (default: %(default)s)")
    return parser


def _plan(arguments: argparse.Namespace) -> SweepPlan:
    _check_positive(arguments)
    check_mfu(arguments.mfu)
    if not 0 <= arguments.run_noise < 1:
        raise ConfigError(
            f"--run-noise is a standard deviation of log loss, such as 0.002, found {arguments.run_noise:g}"
        )
    from megadiff.run.sweep_folder import plan_sweep

    return plan_sweep(arguments.description, arguments.overrides, output=arguments.output)


def _check_positive(arguments: argparse.Namespace) -> None:
    for option, value in (
        ("--mfu", arguments.mfu),
        ("--draws", arguments.draws),
        ("--jobs", vars(arguments).get("jobs")),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"{option} must be above 0, found {value:g}")


def _write(plan: SweepPlan) -> None:
    from megadiff.run.sweep_folder import write_sweep

    new = write_sweep(plan)
    for remark in plan.expansion.remarks:
        print(f"remark            {remark}")
    folder = plan.folder
    print(f"written           {folder}: {len(plan.runs)} runs, {len(new)} of them new")
    print(f"check one         megadiff train --check --config {folder}/descriptions/{plan.runs[0].name}.yaml")
    print(f"submit            {_first_line(folder / 'rows.txt')}")
    if any(run.trunk is not None for run in plan.runs):
        print(f"then              {_first_line(folder / 'branches.txt')}")


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def _start(arguments: argparse.Namespace, plan: SweepPlan) -> None:
    """Write a sweep, unless that is done, and train it."""
    _check_local(arguments)
    from megadiff.run.sweep_folder import write_sweep

    write_sweep(plan)
    for remark in plan.expansion.remarks:
        print(f"remark            {remark}")
    _train(plan.folder, arguments.jobs)


def _go_on(arguments: argparse.Namespace, action: str) -> None:
    """Train a sweep that is written already.

    Raises:
        ConfigError: the folder is none of a sweep, or it is to be written, changed or predicted.
    """
    folder = _folder_of(arguments.description)
    from megadiff.run.sweep_folder import read_manifest

    read_manifest(folder)
    given = [*arguments.overrides, *(["--output"] if arguments.output else []), *["--dry-run"] * arguments.dry_run]
    if action == "write" or given:
        what = f"`{given[0]}`" if given else "`write`"
        raise ConfigError(
            f"{folder} is a sweep that is written already, and {what} needs its description, a YAML file; "
            f"`megadiff sweep run {folder} --local` goes on with it as it is"
        )
    _check_positive(arguments)
    _check_local(arguments)
    _train(folder, arguments.jobs)


def _folder_of(sweep: Path) -> Path:
    """Return the folder of a sweep, given by itself, by its folder `runs`, or by the description it follows from."""
    from megadiff.run.sweep_folder import sweep_of

    if sweep.is_file():
        from megadiff.scaling.sweep import read_sweep

        found = read_sweep(sweep)
        return Path(found.output_dir) / found.name
    return sweep_of(sweep) or sweep


def _check_local(arguments: argparse.Namespace) -> None:
    if not arguments.local:
        raise ConfigError(
            "give --local to train on this machine; on a cluster, write the sweep with `megadiff sweep write` and hand "
            "its rows to `slurm/submit sweep`"
        )


def _train(folder: Path, jobs: int | None) -> None:
    """Train what is left of a written sweep in the local pool."""
    from megadiff.run.sweep_folder import counts, states
    from megadiff.run.sweep_pool import WORKER_LOG, Pool, PoolError, start_worker

    jobs = jobs or len(os.sched_getaffinity(0))
    print(f"{folder}: {counts(states(folder))}; {jobs} at a time", flush=True)
    pool = Pool(folder, jobs, partial(print, flush=True), partial(start_worker, log=folder / WORKER_LOG))
    found = pool.train()
    print(f"{folder}: {counts(found)}")
    if pool.signals:
        raise KeyboardInterrupt
    if pool.failures:
        named = "".join(f"\n  {name}: {reason}" for name, reason in pool.failures.items())
        raise PoolError(f"{len(pool.failures)} runs failed; the same command tries those again that may succeed{named}")


def _status(folder: Path, *, shows_all: bool) -> None:
    from megadiff.run.sweep_folder import counts, states

    found = states(folder)
    for noise in dict.fromkeys(each.noise for each in found):
        print(f"{noise:13} {counts(each for each in found if each.noise == noise)}")
    shown = [each for each in found if shows_all or each.state not in ("finished", "missing")]
    if shown:
        print("\n" + "\n".join(_table(shown)))


def _table(shown: list[RunState]) -> Iterator[str]:
    width = max(len(each.name) for each in shown)
    yield f"{'run':{width}}  {'state':11}  {'step':>15}  {'loss':>7}  reason"
    for each in shown:
        loss = "" if each.loss is None else f"{each.loss:.4f}"
        step = f"{each.step:,}/{each.steps:,}"
        yield f"{each.name:{width}}  {each.state:11}  {step:>15}  {loss:>7}  {each.reason}".rstrip()


def _dry_run(arguments: argparse.Namespace, plan: SweepPlan) -> Iterator[str]:
    """Yield runs, cost and power."""
    from megadiff.platform.gpus import gpu
    from megadiff.scaling.power import sweep_power

    kind, runs, count = gpu(arguments.gpu), plan.runs, plan.sweep.budgets.flop_count
    per_hour = kind.peak_flops * arguments.mfu * 3600
    branches = sum(run.trunk is not None for run in runs)
    sizes, budgets = {run.shape for run in runs}, sorted({flops for run in runs for flops in run.budgets})
    more = f", {branches} of them cooldowns" if branches else ""
    yield (
        f"sweep             {plan.sweep.name}: {len(runs)} runs{more}; {len(sizes)} sizes, {len(budgets)} budgets from "
        f"{budgets[0]:.3g} to {budgets[-1]:.3g} FLOPs ({count})"
    )
    head = f"FLOPs ({count})"
    yield f"{'noise':13} {'runs':>5} {head:>17} {'FLOPs (full)':>13} {'GPU hours':>10}"
    for noise in (*plan.expansion.noises, "total"):
        own = [run for run in runs if noise in (run.noise, "total")]
        flops, full = sum(run.flops for run in own), sum(run.full_flops for run in own)
        yield f"{noise:13} {len(own):5} {flops:17.4g} {full:13.4g} {full / per_hour:10,.1f}"
    yield f"GPU hours at {100 * arguments.mfu:g} % of the {kind.peak_flops / 1e12:,.0f} TFLOP/s of one {kind.name}"
    for remark in plan.expansion.remarks:
        yield f"remark            {remark}"
    yield ""
    power = sweep_power(plan.sweep, runs, plan.book, run_noise=arguments.run_noise, draws=arguments.draws)
    yield from _power_lines(power, arguments)


def _power_lines(power: SweepPower, arguments: argparse.Namespace) -> Iterator[str]:
    yield (
        f"power under a run-to-run noise of {100 * arguments.run_noise:g} % of the loss ({arguments.draws} simulated "
        "sweeps; the best batch and rate of each size and seed counts as one run)"
    )
    yield f"{'noise':13} {'exponent of M*':>15} {'of D*':>15} {'of L*':>18} {'bias M*':>8} {'inner budgets':>14}"
    for noise, found in power.by_noise.items():
        if isinstance(found, str):
            yield f"{noise:13} {found}"
            continue
        value, error = found.exponents, found.standard_errors
        cells = [f"{value[law]:.3f} +- {error[law]:.3f}" for law in ("flops_per_token", "tokens")]
        loss = f"{value['loss'] + found.biases['loss']:.4f} +- {error['loss']:.4f}"  # of a loss with its floor
        inner = f"{found.inner_budgets:.1f} of {found.budgets}"
        bias = f"{found.biases['flops_per_token']:+.3f}"
        yield f"{noise:13} {cells[0]:>15} {cells[1]:>15} {loss:>18} {bias:>8} {inner:>14}"
        if found.failed:
            yield f"{'':13} {100 * found.failed:.0f} % of sweeps leave fewer than three budgets with an inner optimum"
    if power.apart:
        pairs = "; ".join(f"{one} and {other} {100 * chance:.0f} %" for (one, other), chance in power.apart.items())
        yield f"told apart        chance that a sweep tells the exponents of M* apart: {pairs}"
    if power.cheaper:
        yield f"cheaper           {power.cheaper}"
