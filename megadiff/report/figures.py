"""Formatting of numbers for people."""

from __future__ import annotations

_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short(value: float, digits: int = 3) -> str:
    """Return a short form of a number.

    Large numbers get a letter (1.23M, B for 10^9), tiny and huge ones a power of ten.
    """
    size = abs(value)
    if 0 < size < 1e-3 or size >= 1e18:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for scale, letter in _SCALES:
        if size >= scale * (1 - 0.5 * 10**-digits):
            scaled = value / scale
            return f"{scaled:.{digits}g}{letter}" if abs(scaled) < 10**digits else f"{scaled:.0f}{letter}"
    return f"{value:.{digits}g}"


def exact(value: float) -> str:
    """Return a figure with four decimal places; one too large for decimals to mean anything with a power of ten."""
    return f"{value:.4f}" if abs(value) < 1e9 else f"{value:.4e}"


def of_bytes(count: float) -> str:
    """Return a size in bytes, in units of powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.4g} TiB"


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes, hours or days."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.2f} d"


def percent(share: float) -> str:
    """Return a fraction as a percentage."""
    return f"{100 * share:.1f} %"
