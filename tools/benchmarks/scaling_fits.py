"""Time the bootstraps of scaling fits: a surface by both methods, bowls, and a hyperbola, on planted data.

OMP_NUM_THREADS=1 python tools/benchmarks/scaling_fits.py --points 217 --draws 1000
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megadiff.scaling.fit import hyperbola, surface
from megadiff.scaling.isoflop import isoflop
from megadiff.scaling.power import LossSurface

_SURFACE = LossSurface.from_optimum((27.21883, -0.04961), (0.01761, 0.56629))


def main() -> None:
    """Print the CPU seconds of each fit, with its draws and without."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=217, help="points of the surfaces (default: 217)")
    parser.add_argument("--draws", type=int, default=1000, help="resampled data sets (default: 1000)")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    n = 10 ** rng.uniform(7.5, 10.5, arguments.points)
    d = 10 ** rng.uniform(8.5, 11.5, arguments.points)
    loss = (1.8 + 480 * n**-0.35 + 2100 * d**-0.37) * np.exp(0.01 * rng.standard_normal(arguments.points))
    budgets, sizes = np.geomspace(5e17, 2e20, 9), np.geomspace(1.2e8, 7.7e9, 9)
    flops, size = np.tile(budgets, 9), np.repeat(sizes, 9)
    run = np.repeat(np.arange(9), 9)
    swept = _SURFACE(size, flops / size) * np.exp(0.001 * rng.standard_normal(9)[run])
    batch = np.geomspace(2048, 524288, 9)
    steps = 3000 * (2 - (batch / 6e4) ** -0.2) ** -5 * np.exp(0.02 * rng.standard_normal(9))
    fits: dict[str, Callable[[int], Any]] = {
        "surface, log-sum-exp": lambda draws: surface(n, d, loss, "lse", draws=draws),
        "surface, variable projection": lambda draws: surface(n, d, loss, "varpro", draws=draws),
        "bowls, 9 x 9": lambda draws: isoflop(flops, size, swept, list(run), draws=draws),
        "hyperbola, 9 batches": lambda draws: hyperbola(steps, batch, draws=draws),
    }
    print(f"{arguments.points} points of the surfaces, {arguments.draws} draws; CPU seconds of the process")
    print(f"{'fit':32}{'without':>10}{'with draws':>12}")
    for name, fit in fits.items():
        times = []
        for draws in (2, arguments.draws):
            before = time.process_time()
            fit(draws)
            times.append(time.process_time() - before)
        print(f"{name:32}{times[0]:10.2f}{times[1]:12.2f}")


if __name__ == "__main__":
    main()
