"""Validation figures of single sequences, and the comparison of two runs over the same sequences.

Two runs that are evaluated on the same sequences under the same noise err in the same direction on each of them, so
that the difference of their bounds is known much better than either bound: its error is that of the differences of
single sequences. A run keeps these figures in `validation.jsonl` of its folder, one line per evaluation:

| key | value |
|---|---|
| `step` | number of steps taken |
| `sequences` | fingerprint of the validation sequences: SHA-256 of their number and length and their ids, shortened |
| `noise` | `seed`, number of `levels` and range of `log_snr` of the noise; null for an exact likelihood |
| `elbo` | bound of each sequence in nats per token, mean over its noise levels, to 1e-6; null where it is not finite |

Nothing here needs torch or numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megadiff.errors import DataError, StorageError
from megadiff.files import UnreadableFileError, lines, why
from megadiff.metric_lines import finite, parsed

FILE_NAME = "validation.jsonl"
"""Name of the file in a run folder."""

_MAX_LINE_BYTES = 2**27
_NORMAL = 1.959963984540054  # 97.5 % quantile of the normal distribution
_DIGITS = 6


@dataclass(frozen=True)
class EvaluationNoise:
    """The draws of an evaluation, which depend on nothing else but the sequence and its place."""

    seed: int
    levels: int
    """Number of noise levels of each sequence."""
    log_snr: tuple[float, float]
    """Range over which the levels are stratified."""

    def describe(self) -> str:
        """Return the draws in words."""
        return f"{self.levels} level(s) over log-SNR {self.log_snr[0]:g} to {self.log_snr[1]:g} with seed {self.seed}"


@dataclass(frozen=True)
class PerSequence:
    """The bound of every validation sequence at one evaluation."""

    sequences: str
    """Fingerprint of the sequences."""
    noise: EvaluationNoise | None
    """Draws of the noise; None for an exact likelihood. The process that these draws corrupt the text with, such as
    masked or uniform noise, is the run's own and is not part of them."""
    elbo: tuple[float, ...]
    """Nats per token by sequence; NaN where it is not finite."""

    @property
    def mean(self) -> float:
        """The bound over all sequences, as `eval_elbo` of `metrics.jsonl`."""
        return fmean(self.elbo)

    def as_entries(self) -> dict[str, Any]:
        """Return the entries of a line of `validation.jsonl` beside its step."""
        noise = self.noise
        described = None if noise is None else {"seed": noise.seed, "levels": noise.levels, "log_snr": noise.log_snr}
        return {
            "sequences": self.sequences,
            "noise": described,
            "elbo": [round(value, _DIGITS) for value in self.elbo],
        }


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two bounds over the same sequences."""

    difference: float
    """Mean over the sequences of the first bound minus the second, in nats per token."""
    stderr: float
    """Standard error over sequences of the mean of the differences."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    sequences: int
    """Number of sequences."""
    unpaired_stderr: float
    """Standard error that two evaluations on different sequences would give their difference."""


def read(run_folder: Path) -> dict[int, PerSequence]:
    """Return the figures of single sequences of a run by step; none if the run has not recorded any.

    Lines that a kill has torn are left out.

    Raises:
        StorageError: the file cannot be read, or is no plain file.
    """
    path = Path(run_folder) / FILE_NAME
    found: dict[int, PerSequence] = {}
    try:
        for raw in lines(path, max_bytes=_MAX_LINE_BYTES):
            line = parsed(raw)
            figures = None if line is None else _per_sequence(line)
            if line is not None and figures is not None:
                found[line["step"]] = figures
    except FileNotFoundError:
        return {}
    except (OSError, UnreadableFileError) as error:
        raise StorageError(f"{path} {why(error)}") from None
    return dict(sorted(found.items()))


def compare(a: PerSequence, b: PerSequence) -> PairedDifference:
    """Return by how much the bound `a` lies above the bound `b`, sequence by sequence.

    An exact likelihood compares with a bound on the same sequences, and masked with uniform noise under the same draws.

    Raises:
        DataError: the sequences or the draws of the noise differ, or a figure is not finite.
    """
    _check_same(a, b)
    if len(a.elbo) < 2:
        raise DataError(f"a paired comparison needs at least 2 sequences, found {len(a.elbo)}")
    differences = [one - other for one, other in zip(a.elbo, b.elbo, strict=True)]
    if not all(map(math.isfinite, differences)):
        raise DataError("the bound of a sequence is not finite in one of the runs, so there is no difference to give")
    mean, count = fmean(differences), len(differences)
    error = stdev(differences, mean) / math.sqrt(count)
    reach = _student_t(count - 1) * error
    unpaired = math.sqrt((stdev(a.elbo) ** 2 + stdev(b.elbo) ** 2) / count)
    return PairedDifference(mean, error, mean - reach, mean + reach, count, unpaired)


def average(runs: Sequence[PerSequence]) -> PerSequence:
    """Return the mean of the bound of every sequence over runs, such as the seeds of one setting.

    Raises:
        DataError: the sequences or the draws of the noise differ.
    """
    for other in runs[1:]:
        _check_same(runs[0], other)
    noise = next((run.noise for run in runs if run.noise is not None), None)
    return PerSequence(runs[0].sequences, noise, tuple(map(fmean, zip(*(run.elbo for run in runs), strict=True))))


def _check_same(a: PerSequence, b: PerSequence) -> None:
    if a.sequences != b.sequences or len(a.elbo) != len(b.elbo):
        raise DataError(
            f"the runs were evaluated on different sequences ({len(a.elbo):,} with the fingerprint {a.sequences[:8]} "
            f"and {len(b.elbo):,} with {b.sequences[:8]}), so there are no pairs to compare; evaluate both with the "
            "same data.valid, tokenizer, model.seq_length and eval.sequences"
        )
    if a.noise is not None and b.noise is not None and a.noise != b.noise:
        raise DataError(
            f"the runs were evaluated under different noise ({a.noise.describe()}, and {b.noise.describe()}), so there "
            "are no pairs to compare; evaluate both with the same eval.num_noise_levels and range of log-SNR"
        )


def _per_sequence(line: Mapping[str, Any]) -> PerSequence | None:
    """Return the figures of a line; None for a line with anything else in it."""
    sequences, values, noise = line.get("sequences"), line.get("elbo"), line.get("noise")
    if not isinstance(sequences, str) or not isinstance(values, list) or not values:
        return None
    draws = None
    if noise is not None and (draws := _noise(noise)) is None:
        return None
    numbers = [math.nan if value is None else finite(value) for value in values]
    elbo = tuple(number for number in numbers if number is not None)
    return PerSequence(sequences, draws, elbo) if len(elbo) == len(values) else None


def _noise(found: Any) -> EvaluationNoise | None:
    if not isinstance(found, Mapping):
        return None
    seed, levels, ends = found.get("seed"), found.get("levels"), found.get("log_snr")
    if type(seed) is not int or type(levels) is not int or not isinstance(ends, list) or len(ends) != 2:
        return None
    low, high = finite(ends[0]), finite(ends[1])
    return None if low is None or high is None else EvaluationNoise(seed, levels, (low, high))


def student_t_widening(degrees: float) -> float:
    """Return Student's 97.5 % quantile over the normal one, by its expansion in 1 / degrees.

    It is 0.6 % too small at 2 degrees and exact to three digits from 3 on (Abramowitz and Stegun, 26.7.5).
    """
    z = _NORMAL
    terms = (
        (z**2 + 1) / 4,
        (5 * z**4 + 16 * z**2 + 3) / 96,
        (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384,
        (79 * z**8 + 776 * z**6 + 1482 * z**4 - 1920 * z**2 - 945) / 92160,
    )
    return 1.0 + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def _student_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t: exact for 1 and 2 degrees, else by expansion (error < 4e-3)."""
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    return _NORMAL * student_t_widening(freedom)
