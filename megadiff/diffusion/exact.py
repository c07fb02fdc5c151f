"""Elementary functions of float64 arrays made of IEEE-exact operations alone.

`numpy.log` and friends call the machine's mathematical library or vector unit, whose last bit differs between
machines; a noised sequence must not. Every step below is an addition, multiplication, division, square root, rounding
or exponent shift, which IEEE 754 fixes to the bit. All are accurate to a few units in the last place.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# log 2 in two parts: the first has 21 trailing zero bits, so that k * LN2_HI is exact (the constants of fdlibm).
_LN2_HI, _LN2_LO = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG2_E = 1.44269504088896338700e00
_SQRT_HALF = 0.70710678118654752440
# Coefficients are arrays, since numpy would convert a number in every call.
_EXP = [np.array(1.0 / math.factorial(k)) for k in range(14)]
_ATANH = [np.array(1.0 / (2 * k + 1)) for k in range(13)]
_ATAN = [np.array((-1.0) ** k / (2 * k + 1)) for k in range(14)]
_SIN = [np.array((-1.0) ** k / math.factorial(2 * k + 1)) for k in range(9)]
_COS = [np.array((-1.0) ** k / math.factorial(2 * k)) for k in range(9)]


def exp(x: npt.ArrayLike) -> FloatArray:
    """e^x, with x held to [-700, 700]."""
    x = np.minimum(np.maximum(np.asarray(x, dtype=np.float64), -700.0), 700.0)
    k = np.rint(x * _LOG2_E)
    r = (x - k * _LN2_HI) - k * _LN2_LO
    return np.ldexp(_polynomial(_EXP, r), k.astype(np.int32))


def log(x: npt.ArrayLike) -> FloatArray:
    """log x for x > 0."""
    mantissa, exponent = np.frexp(np.asarray(x, dtype=np.float64))
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    k = (exponent - low).astype(np.float64)
    f = (mantissa - 1.0) / (mantissa + 1.0)
    return k * _LN2_HI + (k * _LN2_LO + 2.0 * f * _polynomial(_ATANH, f * f))


def sqrt(x: npt.ArrayLike) -> FloatArray:
    """Return the square root of x >= 0, which IEEE 754 rounds correctly."""
    return np.sqrt(np.asarray(x, dtype=np.float64))


def sigmoid(x: npt.ArrayLike) -> FloatArray:
    """1 / (1 + e^-x), accurate at both ends; never exactly 0."""
    return 1.0 / (1.0 + exp(-np.asarray(x, dtype=np.float64)))


def atan(y: npt.ArrayLike) -> FloatArray:
    """Return the arc tangent of y >= 0 in [0, pi/2]: three halvings of the angle, then its series."""
    y = np.asarray(y, dtype=np.float64)
    for _ in range(3):
        y = y / (1.0 + np.sqrt(1.0 + y * y))
    return 8.0 * (y * _polynomial(_ATAN, y * y))


def log_tan_half_pi(t: npt.ArrayLike) -> FloatArray:
    """log tan(pi t / 2) for 0 < t < 1; antisymmetric about t = 1/2."""
    t = np.asarray(t, dtype=np.float64)
    upper = t > 0.5
    angle = np.where(upper, 1.0 - t, t) * (0.5 * math.pi)
    square = angle * angle
    value = log(angle * _polynomial(_SIN, square)) - log(_polynomial(_COS, square))
    return np.where(upper, -value, value)


def _polynomial(coefficients: list[FloatArray], x: FloatArray) -> FloatArray:
    """Evaluate the polynomial with these coefficients, lowest first, by Horner's rule."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total *= x
        total += coefficient
    return total
