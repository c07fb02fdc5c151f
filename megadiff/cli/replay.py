"""Repeat one step of a run in one CPU process; show its sequences, their noise and losses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megadiff.errors import ConfigError

if TYPE_CHECKING:
    from megadiff.run.replay import Replayed, ReplayedSequence

_EPILOG = """examples:
  megadiff replay --run runs/demo --step 120
  megadiff replay --run runs/demo --step 120 --sequences 0 --save step_120.npz data.train=[data/train]

The run may have any layout. The replay starts from the newest checkpoint before the step, or from the first weights if
there is none, and takes the steps in between in memory. The run folder is only read.
"""

_SHOWN_ROWS = 32


def main() -> None:
    """Read the command line, replay the step, print it, and save it."""
    from megadiff.config.command_line import SettingsParser, refuse_unknown

    parser = SettingsParser(
        settings_help="settings that replace the run's, such as data paths", description=__doc__, epilog=_EPILOG
    )
    parser.add_argument("--run", type=Path, required=True, help="the run folder, such as runs/NAME")
    parser.add_argument("--step", type=int, required=True, help="the step, counted from 1 as in metrics.jsonl")
    parser.add_argument(
        "--sequences", type=int, default=_SHOWN_ROWS, help=f"sequences to print, 0 for all (default {_SHOWN_ROWS})"
    )
    parser.add_argument("--save", type=Path, metavar="F.npz", help="write batch, noise and losses per token here")
    arguments = parser.parse_with_settings()
    from megadiff.run.config import RunConfig

    refuse_unknown(arguments, RunConfig)
    if arguments.sequences < 0:
        raise ConfigError(f"--sequences {arguments.sequences}: a number of sequences is wanted, 0 for all")
    if arguments.save is not None:
        _refuse_bad_output(arguments.save, arguments.run)

    from megadiff.platform.quiet import quiet

    with quiet():
        from megadiff.run.replay import replay
    from megadiff.run.folder import log_to_console

    log_to_console()
    found = replay(arguments.run, arguments.step, arguments.overrides)
    print("\n".join(describe(found, sequences=arguments.sequences or len(found.sequences))))
    if arguments.save is not None:
        found.save(arguments.save)
        print(f"batch, noise and losses per token are in {arguments.save}")


def describe(found: Replayed, *, sequences: int) -> list[str]:
    """Return the lines to print: the first `sequences` sequences and every one that is not finite, then the totals."""
    between = f", {found.steps_between} step(s) taken in memory" if found.steps_between else ""
    lines = [
        f"step {found.step}, from {found.start}{between}",
        f"{'sample':>10} {'log-SNR':>16} {'noisy':>6} {'loss':>12} {'elbo':>12}  first token",
    ]
    shown = [sequence for place, sequence in enumerate(found.sequences) if place < sequences or not sequence.is_finite]
    lines += [_line(sequence) for sequence in shown]
    if len(shown) < len(found.sequences):
        lines.append(f"  ({len(found.sequences) - len(shown)} more sequences; --sequences 0 shows all)")
    differences = found.differences()
    for key, value in found.figures.items():
        difference = differences[key]
        logged = "has no line in metrics.jsonl" if found.logged is None else f"{found.logged.get(key)} was logged"
        compared = f", relative difference {difference:.1e}" if difference is not None else ""
        lines.append(f"{key:>10} {value!r} ({logged}{compared})")
    if found.skip is not None:
        lines.append(f"the run makes no update in this step: {found.skip}")
    if found.broken_sequence is not None:
        lines.append(f"the first sequence that is not finite, in loss or gradient, is sample {found.broken_sequence}")
    return lines


def _line(sequence: ReplayedSequence) -> str:
    low, high = sequence.log_snr
    level = f"{low:+.4f}" if low == high else f"{low:+.2f} to {high:+.2f}"
    origin = sequence.origin
    place = f"{origin.prefix}: token {origin.token}, document {origin.document} + {origin.within}"
    mark = "" if sequence.is_finite else "  NOT FINITE"
    return (
        f"{sequence.sample:>10} {level:>16} {sequence.noisy_tokens:>6} {sequence.loss:>12.6f} "
        f"{sequence.elbo:>12.6f}  {place}{mark}"
    )


def _refuse_bad_output(path: Path, run: Path) -> None:
    if path.suffix != ".npz":
        raise ConfigError(f"--save {path}: a name ending in .npz is wanted")
    if not path.parent.is_dir():
        raise ConfigError(f"--save {path}: there is no folder {path.parent}; make it first")
    if path.resolve().is_relative_to(run.resolve()):
        raise ConfigError(f"--save {path}: that is inside the run folder, which is only read; give another place")
