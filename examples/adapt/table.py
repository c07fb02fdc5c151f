"""Print the validation ELBO of the study's runs by step, and draw it: mean and range over seeds.

python examples/adapt/table.py [--figure examples/adapt/curves.svg]
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt

from megadiff.metric_lines import read_metrics

RUN = re.compile(r"(?P<shape>llama|qwen)-(?P<kind>[a-z-]+)-(?P<seed>\d+)")
Curves = dict[str, dict[str, dict[int, list[float]]]]
"""Validation ELBO in nats per byte, of the seeds, by shape, kind of run and step."""


def curves(folder: Path) -> Curves:
    """Return the figures of all runs of the study that are there."""
    found: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for path in sorted(folder.iterdir()):
        if match := RUN.fullmatch(path.name):
            for line in read_metrics(path / "metrics.jsonl"):
                if "eval_elbo" in line:
                    found[match["shape"]][match["kind"]][line["step"]].append(line["eval_elbo"])
    return found


def main() -> None:
    """Print one table a shape, and write the figure if one is wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/adapt"), help="folder of the runs")
    parser.add_argument("--figure", type=Path, help="file to draw the curves in")
    arguments = parser.parse_args()
    found = curves(arguments.runs)
    for shape, kinds in found.items():
        steps = sorted({step for kind in kinds.values() for step in kind})
        print(f"| {shape}: steps | " + " | ".join(f"{step:,}" for step in steps) + " |")
        print("|---" * (len(steps) + 1) + "|")
        for kind, by_step in kinds.items():
            print(f"| {kind} | " + " | ".join(_cell(by_step.get(step, [])) for step in steps) + " |")
        print()
    if arguments.figure:
        _draw(found, arguments.figure)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" +- {stdev(values):.3f}" if len(values) > 1 else "")


def _draw(found: Curves, path: Path) -> None:
    figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 3.5), sharey=True, squeeze=False)
    for axis, (shape, kinds) in zip(axes[0], found.items(), strict=True):
        for kind, by_step in kinds.items():
            steps = [step for step in sorted(by_step) if step]
            axis.plot(steps, [mean(by_step[step]) for step in steps], marker="o", markersize=3, label=kind)
            lows, highs = ([end(by_step[step]) for step in steps] for end in (min, max))
            axis.fill_between(steps, lows, highs, alpha=0.2)
        axis.set(title=shape, xlabel="step (2,048 tokens each)", xscale="log")
    axes[0][0].set_ylabel("validation ELBO, nats per byte")
    axes[0][0].legend()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
