"""GPUs by name: peak speed and memory from the datasheets. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megadiff.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    peak_flops: float
    """Dense bf16 FLOP/s."""
    memory_bytes: float


GPUS = (
    Gpu("H100", 989e12, 80e9),
    Gpu("H200", 989e12, 141e9),
    Gpu("GH200", 989e12, 96e9),
    Gpu("B200", 2250e12, 180e9),
    Gpu("A100", 312e12, 80e9),
    Gpu("A100-40GB", 312e12, 40e9),
    Gpu("L40S", 362e12, 48e9),
)


DEFAULT_GPU, DEFAULT_MFU = "H100", 0.4
"""GPU, and share of its peak that training reaches, of plans and costs that do not name theirs."""


def check_mfu(share: float) -> None:
    """Check the share of a peak that an option `--mfu` gives; that it is positive is left to the caller.

    Raises:
        ConfigError: it is above 1.
    """
    if share > 1:
        raise ConfigError(f"--mfu is a share of the peak, at most 1, found {share:g}")


def gpu(name: str) -> Gpu:
    """Return a GPU by its name, in capitals or not.

    Raises:
        ConfigError: it is not in the list.
    """
    found = next((each for each in GPUS if each.name.lower() == name.lower()), None)
    if found is None:
        known = ", ".join(each.name for each in GPUS)
        raise ConfigError(f"the GPU `{name}` is not known; there are {known}, of which one with the same peak would do")
    return found


def peak_of_device(device_name: str) -> float | None:
    """Return the peak in dense bf16 FLOP/s of a device by the name that its driver gives; None if it is not known."""
    return next((each.peak_flops for each in GPUS if each.name in device_name), None)
