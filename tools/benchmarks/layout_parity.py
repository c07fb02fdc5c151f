"""Write how far the curves of layouts lie from that of one process, with the Python and megatron-core that run this."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megadiff.config.command_line import CommandParser
from megadiff.errors import ConfigError, run_command

_EPILOG = """example:
  OMP_NUM_THREADS=1 PYTHONPATH=. python tools/benchmarks/layout_parity.py --page docs/parallelism.md

Run it once in each environment: the row of this one is added to the table of the page, or replaced there. A toy model
is trained for six steps in float32 on CPU ranks, under balanced noise with the paper's block. The figure of a layout is
the largest relative difference of loss or gradient norm in a step. It takes about a minute of CPU time.
"""
BEGIN, END = "<!-- layout parity -->", "<!-- end of layout parity -->"
"""Lines of a page between which the table lies."""
STEPS = 6
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, sequence": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pipeline 2 x 2 chunks": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "data 2, distributed optimizer": (2, {"parallel__distributed_optimizer": True}),
    "tensor 2, pipeline 2, data 2": (
        8,
        {
            "parallel__tensor": 2,
            "parallel__pipeline": 2,
            "parallel__sequence": True,
            "parallel__distributed_optimizer": True,
        },
    ),
}
"""Number of ranks of each layout, and its settings."""
_BLOCK = {"noise__shift": "balanced", "model__qk_norm": "full", "model__sink": True, "model__mlp_bias": True}
_FIGURES = ("loss", "grad_norm")
_VERSIONS = 3
"""Number of cells with versions at the start of a row."""


def main() -> None:
    """Train on every layout, and print the table or write it into a page."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, metavar="FILE", help="Markdown page whose table gets the row")
    parser.add_argument(
        "--at-most", type=float, metavar="X", help="end with exit code 1 if a layout's difference is larger"
    )
    arguments = parser.parse_args()
    text = "" if arguments.page is None else _page(arguments.page)
    row = measured_row()
    if arguments.page is None:
        print("\n".join(table([row])))
    else:
        arguments.page.write_text(with_row(text, row), encoding="utf-8")
    if arguments.at_most is not None and not all(float(cell) <= arguments.at_most for cell in row[_VERSIONS + 1 :]):
        sys.exit(f"a layout's curve lies further than {arguments.at_most:g} from that of one process")


def _page(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--page {path} cannot be read ({error.strerror}); name a Markdown page") from None
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ConfigError(f"--page {path} has no lines `{BEGIN}` and `{END}`; write them where the table should be")
    return text


def measured_row() -> list[str]:
    """Return the cells of this environment: its versions, the loss of one process, and the differences."""
    from megadiff.platform.quiet import quiet

    with quiet():
        from megadiff.testing.ranks import on_ranks
        from megadiff.testing.toy_run import write_corpus

        with TemporaryDirectory() as name:
            folder = Path(name)
            write_corpus(folder / "corpus")
            cases = {"one": (1, {}), **LAYOUTS}
            versions: list[str] = []
            for layout, (ranks, changes) in cases.items():
                versions, *_ = on_ranks(ranks, _train, folder, layout, ranks, changes)
            curves = {layout: _curve(folder / layout) for layout in cases}
    one = curves.pop("one")
    differences = [f"{largest_difference(one, curve):.1e}" for curve in curves.values()]
    return [*versions, f"{one[-1][0]:.6f}", *differences]


def _train(folder: Path, name: str, ranks: int, changes: dict[str, Any]) -> list[str]:
    """Train on this rank, and return the versions of Python, megatron-core and torch that did."""
    import logging

    import torch

    from megadiff.testing.toy_run import toy_config, wire_on_rank

    logging.disable(logging.WARNING)  # that there are no validation data

    settings = {"name": name, "data__valid": [], "schedule__steps": STEPS, **_BLOCK, **changes}
    wire_on_rank(toy_config(folder / "corpus", folder, **settings), ranks).train()
    import megatron.core

    versions = (platform.python_version(), megatron.core.__version__, torch.__version__)
    return [version.split("+")[0] for version in versions]


def _curve(folder: Path) -> list[tuple[float, ...]]:
    from megadiff.metric_lines import read_metrics

    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert len(lines) == STEPS
    return [tuple(line[figure] for figure in _FIGURES) for line in lines]


def largest_difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Return the largest relative difference of two curves' figures in a step."""
    pairs = [(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of the table, by versions in ascending order."""
    heads = ["Python", "megatron-core", "torch", f"loss of step {STEPS}, one process", *LAYOUTS]
    return [_line(heads), _line(["---"] * len(heads)), *(_line(row) for row in sorted(rows, key=_by_versions))]


def _by_versions(row: Sequence[str]) -> list[list[int]]:
    return [[int(part) for part in re.findall(r"\d+", cell)] for cell in row[:_VERSIONS]]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def with_row(page: str, row: Sequence[str]) -> str:
    """Return a page whose table has this row in the place of an older one of the same versions."""
    before, rest = page.split(BEGIN)
    inside, after = rest.split(END)
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in inside.splitlines() if line][2:]
    kept = [old for old in rows if old[:_VERSIONS] != list(row[:_VERSIONS])]
    return before + BEGIN + "\n\n" + "\n".join(table([*kept, row])) + "\n\n" + END + after


if __name__ == "__main__":
    run_command(main)
