"""How often to save: what loses least between saving too often and repeating too much after a failure.

Symbols: C seconds that training stands still for one save, M mean seconds between failures, R seconds from a failure
to the next step, tau seconds of training between two saves. Failures come at random (exponential gaps of mean M).
"""

from __future__ import annotations

import math

_FIRST_ORDER_UP_TO = 0.01
"""C / M up to which Young's form is as good as Daly's."""


def young(save_cost_s: float, mtbf_s: float) -> float:
    """tau = sqrt(2 C M), to first order in C / M.

    Source: J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974.
    """
    return math.sqrt(2 * save_cost_s * mtbf_s)


def daly(save_cost_s: float, mtbf_s: float) -> float:
    """tau = sqrt(2 C M) (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C; M where C is 2 M or more.

    Source: J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation
    Computer Systems 22(3), 2006, equation 37.
    """
    if save_cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_cost_s / (2 * mtbf_s)
    return young(save_cost_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_cost_s


def best_interval(save_cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between saves: Young's while a save is cheap against M, Daly's beyond."""
    form = young if save_cost_s <= _FIRST_ORDER_UP_TO * mtbf_s else daly
    return form(save_cost_s, mtbf_s)


def expected_loss(interval_s: float, save_cost_s: float, mtbf_s: float, *, restart_s: float = 0.0) -> float:
    """The share of wall time, 0 to 1, that saves, repeated work and restarts take.

    To get tau seconds of work and their save done takes M exp(R / M) (exp((tau + C) / M) - 1) seconds on average
    (Daly 2006, equation 20); to first order the loss is C / tau + tau / 2M + R / M.
    """
    exponent = (interval_s + save_cost_s) / mtbf_s
    if exponent + restart_s / mtbf_s > 700:  # exp would overflow: nothing is ever finished
        return 1.0
    return 1 - interval_s / (mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(exponent))
