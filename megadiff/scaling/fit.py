"""The three fits of a scaling law: power laws, loss surfaces, and hyperbolas of batch against steps.

Each returns a `Fit`: estimates, standard errors and intervals by name, the evidence of convergence, and the draws that
the intervals come from. `groups` names the run of each point; intervals come from resampling whole runs.
"""

from __future__ import annotations

from megadiff.scaling.hyperbola_fit import Hyperbola, hyperbola
from megadiff.scaling.power_law_fit import PowerLaw, SlopesByGroup, power_law, power_law_from_draws, slopes_by
from megadiff.scaling.surface_fit import Surface, surface

__all__ = [
    "Hyperbola",
    "PowerLaw",
    "SlopesByGroup",
    "Surface",
    "hyperbola",
    "power_law",
    "power_law_from_draws",
    "slopes_by",
    "surface",
]
