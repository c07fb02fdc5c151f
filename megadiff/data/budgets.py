"""Budgets of sources: the numbers of samples that give each its epochs or tokens by the end of a run or phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megadiff.data.config import SourceConfig
from megadiff.data.mixture import whole_shares
from megadiff.errors import DataError


class Budgets(NamedTuple):
    """The budgets of a phase."""

    targets: tuple[int | None, ...]
    """Number of sequences that each source has given in the run at the end of the phase; None without a budget."""
    ends_at: int
    """Number of samples of the run at the end of the phase."""


def target_of(entries: Mapping[str, SourceConfig], sequences: int, seq_length: int) -> int | None:
    """Return the number of sequences that a source is to give by the end of a phase; None if it has no budget.

    Args:
        entries: entries of the configuration that name the source, by their keys; their budgets add up.
        sequences: number of sequences in an epoch.
        seq_length: L.

    Raises:
        DataError: an entry has a budget and another one has none, or the budget is less than a sequence.
    """
    with_budget = [entry for entry in entries.values() if entry.has_budget]
    if not with_budget:
        return None
    if len(with_budget) < len(entries):
        raise DataError(
            f"{' and '.join(entries)} hold the same text, and not all of them have a budget of epochs or tokens; list "
            "it once, with the budget it should have"
        )
    target = 0
    for entry in with_budget:
        target += round(sequences * entry.epochs if entry.epochs is not None else (entry.tokens or 0) / seq_length)
    if not target:
        raise DataError(
            f"{' and '.join(entries)}: the budget is less than half a sequence of {seq_length} tokens; raise it, or "
            "leave the source out"
        )
    return target


def sample_counts(
    budgets: Budgets,
    *,
    first_sample: int,
    starts: Sequence[int],
    weights: Sequence[float],
    keys: Sequence[str],
) -> list[int]:
    """Return the number of samples of each source from `first_sample` to the end of the phase.

    Args:
        budgets: the budgets of the phase.
        first_sample: sample at which the mixture begins.
        starts: sequences that each source has given before.
        weights: shares of the sources without a budget, in any unit; those of others are ignored.
        keys: configuration key of each source, for messages.

    Raises:
        DataError: the budgets are more than the samples, or leave samples that no source gives.
    """
    samples = budgets.ends_at - first_sample
    counts = [
        0 if target is None else max(0, target - start) for target, start in zip(budgets.targets, starts, strict=True)
    ]
    free, rest = [place for place, target in enumerate(budgets.targets) if target is None], samples - sum(counts)
    named = ", ".join(f"{keys[place]} {count:,}" for place, count in enumerate(counts) if place not in free)
    if rest < len(free):
        raise DataError(
            f"the budgets take {sum(counts):,} sequences ({named}) of the {samples:,} that come until sample "
            f"{budgets.ends_at:,}, which leaves {max(rest, 0):,} to {len(free)} other source(s); lower epochs or "
            "tokens, or train longer"
        )
    if rest and not free:
        raise DataError(
            f"the budgets take {sum(counts):,} sequences ({named}), but {samples:,} come until sample "
            f"{budgets.ends_at:,}; leave one source without epochs or tokens, which gives the others"
        )
    if free:
        shares = whole_shares([weights[place] for place in free], rest, [keys[place] for place in free])
        for place, share in zip(free, shares, strict=True):
            counts[place] = share
    return counts
