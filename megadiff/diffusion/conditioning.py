"""Conditioning of a sequence before it is noised: empty tokens, noise-free positions, the pattern of its noise levels.

All draws come from counter streams keyed by (seed, sequence), so a sequence's conditioning is a function of its global
index. The order is the reference's: empty tokens first, then prompts and infilling, then levels
(arXiv:2512.10858, 4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from megadiff.diffusion import exact
from megadiff.diffusion.config import ConditioningConfig
from megadiff.diffusion.philox import Stream, threshold
from megadiff.diffusion.schedules import NoiseSchedule
from megadiff.diffusion.shapes import Bool, Float, Int

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


class NoisePattern(IntEnum):
    """The pattern of noise levels along a sequence."""

    ISOTROPIC = 0
    """One level throughout."""
    PER_TOKEN = 1
    """A level of its own at every token."""
    LINEAR = 2
    """Clean at the start, noisy at the end."""
    NEXT_TOKEN = 3
    """No noise: every token is predicted from those before it (`methods.adaptation`)."""


@dataclass(frozen=True)
class SequenceDraws:
    """Outcomes of the sequences' coins, before any token is touched."""

    pattern: Int[npt.NDArray[np.int8], " B"]
    """Members of `NoisePattern`."""
    prompt_fraction: Float[FloatArray, " B"]
    """Fraction f of the sequence that is prompt; below 0 without a prompt."""
    infill_fraction: Float[FloatArray, " B"]
    """Probability that a token is kept for infilling; 0 without infilling."""
    empty_fraction: Float[FloatArray, " B"]
    """Drawn share of empty tokens."""

    def of(self, which: Int[IntArray, " N"]) -> SequenceDraws:
        """Select some sequences."""
        return SequenceDraws(
            self.pattern[which], self.prompt_fraction[which], self.infill_fraction[which], self.empty_fraction[which]
        )


def draw_sequences(stream: Stream, sequences: Int[IntArray, " B"], config: ConditioningConfig) -> SequenceDraws:
    """Draw the sequence-level coins of `conditioning`, one counter block each at positions 0 to 5 of the sequence."""
    if not any((config.per_token_noise, config.linear_noise, config.prompt, config.infilling, config.pad_insertion)):
        nothing = np.zeros(len(sequences))
        return SequenceDraws(
            np.full(len(sequences), NoisePattern.ISOTROPIC, dtype=np.int8), nothing - 1.0, nothing, nothing
        )
    kind, prompt_coin, prompt_r, infill_coin, infill_r, empty_r = stream.uniforms(sequences, 6).T
    pattern = np.where(kind < config.per_token_noise + config.linear_noise, NoisePattern.LINEAR, NoisePattern.ISOTROPIC)
    pattern = np.where(kind < config.per_token_noise, NoisePattern.PER_TOKEN, pattern).astype(np.int8)
    prompt = np.where(prompt_coin < config.prompt, config.max_fraction * arccos_law(prompt_r), -1.0)
    infill = np.where(infill_coin < config.infilling, config.max_fraction * arccos_law(infill_r), 0.0)
    return SequenceDraws(pattern, prompt, infill, config.pad_insertion * empty_r)


def arccos_law(r: npt.ArrayLike) -> FloatArray:
    """f = arccos(1 - 2 r) / pi for r in [0, 1): density (pi / 2) sin(pi f), mean 1/2, few very short or very long."""
    r = np.asarray(r, dtype=np.float64)
    return exact.atan(np.sqrt(r / (1.0 - r))) / (0.5 * math.pi)


def prompt_lengths(fraction: Float[FloatArray, " B"], length: int) -> Int[IntArray, " B"]:
    """Return the number of tokens i with i <= f (L - 1): at least 1 for a drawn prompt, 0 for a sequence without one
    (fraction below 0)."""
    whole = np.floor(fraction * (length - 1)).astype(np.int64) + 1
    return np.where(fraction < 0, 0, whole)


def linear_log_snr(length: int, schedule: NoiseSchedule) -> Float[FloatArray, " {length}"]:
    """Return the levels of a linear sequence: alpha = 1 - i / (L + 1) for i = 1..L, whatever the schedule.

    They are clipped to the schedule's interval.
    """
    i = np.arange(1, length + 1, dtype=np.float64)
    return np.clip(exact.log((length + 1 - i) / i), schedule.min_log_snr, schedule.max_log_snr)


def empty_counts(fraction: Float[FloatArray, " B"], length: int, law: str) -> Int[IntArray, " B"]:
    """Return the number of empty tokens of each sequence of `length`.

    share: f L rounded, so that a share f of the visible sequence is empty, as the paper says.
    released: ceil(L f / (1 - f)), as the released code has it: f / (1 - f) of the visible sequence, up to
        25 % for 20 %.
    """
    if law == "released":
        return np.minimum(np.ceil(length * fraction / (1.0 - fraction)).astype(np.int64), length)
    return np.floor(length * fraction + 0.5).astype(np.int64)


def empty_positions(
    stream: Stream, sequences: Int[IntArray, " B"], counts: Int[IntArray, " B"], length: int
) -> Bool[BoolArray, "B {length}"]:
    """Draw the places of a sequence's `counts` empty tokens, uniformly among all: `counts` trues in each sequence."""
    is_empty = np.zeros((len(sequences), length), dtype=np.bool_)
    some = np.flatnonzero(counts)
    if len(some):
        # The position in the low bits makes keys differ, so the smallest `count` of them are exactly that many.
        keys = (stream.words(sequences[some], length, count=1)[0] << np.uint64(32)) | np.arange(length, dtype=np.uint64)
        last = np.take_along_axis(np.sort(keys, axis=1), counts[some, None] - 1, axis=1)
        is_empty[some] = keys <= last
    return is_empty


def insert_empties(
    clean: Int[IntArray, "B L"], is_empty: Bool[BoolArray, "B L"], pad_id: int
) -> tuple[Int[IntArray, "B L"], Int[IntArray, "B L"]]:
    """Push pad tokens into sequences at `is_empty`; real tokens keep their order and the last ones fall off the end.

    Returns:
        (sequences, source): `source` is the original position of each token, and for an empty one that of the
        next real token, so that what belongs to positions (documents, say) can follow: `documents[sequence, source]`.
    """
    length = clean.shape[1]
    is_real = ~is_empty
    source = np.cumsum(is_real, axis=1, dtype=np.int64)
    source -= is_real
    np.minimum(source, length - 1, out=source)
    moved = np.take(clean, source + length * np.arange(len(clean))[:, None])
    return np.where(is_empty, pad_id, moved), source


def noisy_positions(
    draws: SequenceDraws, length: int, sequences: Int[IntArray, " B"], infill: Stream
) -> tuple[Bool[BoolArray, "B {length}"], Int[IntArray, " B"]]:
    """Return the positions that may be noised, and the prompt's length of each sequence."""
    prompt = prompt_lengths(draws.prompt_fraction, length)
    is_noisy = np.arange(length) >= prompt[:, None]
    some = np.flatnonzero(draws.infill_fraction > 0)
    if len(some):
        kept = infill.words(sequences[some], length, count=1)[0] < threshold(draws.infill_fraction[some])[:, None]
        is_noisy[some] &= ~kept
    return is_noisy, prompt
