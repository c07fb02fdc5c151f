"""Description of a run's data before training: a line per source, changes, and likely mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megadiff.data.config import DataConfig
from megadiff.data.facts import SourceFacts, ValidationFacts
from megadiff.data.mixture import Mixture, Position
from megadiff.data.open import OpenData, TrainingSource, occurring_passages

MOST_EPOCHS = 4
"""Number of epochs up to which repeated text is nearly as good as new text (Muennighoff et al., arXiv:2305.16264)."""

MOST_UNEVEN = 10
"""Ratio of epochs to another source's at which a repeated source causes a warning."""


class Advice(NamedTuple):
    """A likely mistake, and what to do about it."""

    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}"


def describe_sources(data: OpenData, *, now: int, end: int) -> list[str]:
    """Return a line about the mixture and a line for each source.

    Args:
        data: the run's data.
        now: number of samples of the run so far.
        end: number of samples of the whole run.
    """
    by = "size" if data.weights is None else "weight"
    sources = f" in {len(data.sources)} sources, shared by {by}" if len(data.sources) > 1 else ""
    epochs = _overall_epochs(data, end)
    lines = [f"data              {data.train_tokens:,} tokens to train on{sources}: {epochs:.2f} epochs at the end"]
    for found in source_facts(data, now=now, end=end):
        so_far = f"{found.epochs_now:.2f} epochs so far, " if now else ""
        lines.append(
            f"  {found.key:<15} {found.source}: {found.tokens:,} tokens, {found.sequences:,} sequences, "
            f"share {found.share:.2%}, {so_far}{found.epochs_at_end:.2f} epochs at the end"
        )
    return lines


def describe_validation(data: OpenData) -> list[str]:
    """Return a line for each validation source."""
    return [
        f"  {found.key:<15} {found.source}: {found.tokens:,} tokens, {found.sequences:,} sequences, "
        f"{found.measured:,} of them ({found.measured_tokens:,} tokens) measured"
        for found in validation_facts(data)
    ]


def source_facts(data: OpenData, *, now: int, end: int) -> list[SourceFacts]:
    """Return sizes, share, and epochs before samples `now` and `end` of each training source."""
    columns = (data.sources, data.train.blend.shares, data.train.epochs_at(now), data.train.epochs_at(end))
    return [
        SourceFacts(
            key=", ".join(source.keys),
            source=source.label,
            tokens=source.reader.num_tokens,
            sequences=source.sequences,
            share=share,
            epochs_now=so_far,
            epochs_at_end=in_all,
        )
        for source, share, so_far, in_all in zip(*columns, strict=True)
    ]


def validation_facts(data: OpenData) -> list[ValidationFacts]:
    """Return the size of each validation source, and the part of it that is evaluated."""
    return [
        ValidationFacts(
            key=f"data.valid[{place}]",
            source=source.name,
            tokens=source.num_tokens,
            sequences=source.available,
            measured=len(source),
            measured_tokens=len(source) * source.seq_length,
        )
        for place, source in enumerate(data.valid)
    ]


def describe_change(before: Mixture, data: OpenData, *, end: int) -> list[str]:
    """Return the effect of a changed mixture on each source: what was seen of it, and what will be repeated.

    Args:
        before: mixture of the checkpoint, with the positions reached.
        data: data from now on, continued.
        end: number of samples of the whole run.
    """
    now = data.mixture.first_sample
    lines = [f"data changed      at sample {now:,}: every source continues at its own next sequence"]
    lines += [_continued_line(data, place, before, end) for place in range(len(data.sources))]
    had = {position.name for position in before.sources}
    lines += [
        f"  {'no longer drawn':<15} {position.path}: {_seen(position)}; if it returns it continues from there"
        for position in data.mixture.removed
        if position.name in had
    ]
    return lines


def _continued_line(data: OpenData, place: int, before: Mixture, end: int) -> str:
    source, position = data.sources[place], data.mixture.sources[place]
    in_all = data.train.drawn_before(end)[place]
    if position.name in _names(before):
        seen = _seen(position)
    elif position.parts:
        gained = position.parts[-1]
        seen = f"grown by {gained.sequences:,} sequences, {_seen(position)}"
    else:
        seen = f"new, none of its {source.sequences:,} sequences seen"
    again = _repeated(data, place, end)
    repeats = f"{again:,} of them a repeat" if again else "none of them a repeat"
    return (
        f"  {source.keys[0]:<15} {source.label}: {seen}; {in_all - position.start:,} to come, {repeats} "
        f"({in_all / source.sequences:.2f} epochs at the end)"
    )


def _names(mixture: Mixture) -> set[str]:
    return {position.name for position in (*mixture.sources, *mixture.removed)}


def _seen(position: Position) -> str:
    return f"{position.drawn:,} sequences of {position.sequences:,} seen ({position.epochs:.2f} epochs)"


def _repeated(data: OpenData, place: int, end: int) -> int:
    """Return the number of sequences still to come from a source that will have been seen before."""
    sequences, start, in_all = data.train.sources[place], data.train.starts[place], data.train.drawn_before(end)[place]
    return in_all - start - (sequences.unseen(start) - sequences.unseen(in_all))


def change_advice(before: Mixture, data: OpenData, *, end: int) -> list[Advice]:
    """Return warnings about a change of the mixture: sources that repeat, and files whose content was replaced."""
    found = [
        Advice(
            f"{source.keys[0]} ({source.label}): {again:,} of the "
            f"{data.train.drawn_before(end)[place] - data.train.starts[place]:,} sequences to come will have been seen "
            "before",
            "lower its weight, add text, or shorten the schedule if that is not wanted",
        )
        for place, source in enumerate(data.sources)
        if (again := _repeated(data, place, end))
    ]
    lost = {position.path: position for position in data.mixture.removed}
    for source, position in zip(data.sources, data.mixture.sources, strict=True):
        old = lost.get(source.reader.prefix)
        if old is not None and position.name not in _names(before) and not position.parts:
            text = (
                f"{source.keys[0]} ({source.label}) does not open with the content of which {old.drawn:,} sequences "
                "were drawn, and begins as a new source: what both contents hold is seen again"
            )
            found.append(
                Advice(text, "put the earlier content back, append to it, or give new text as a source of its own")
            )
    return found


def advice(data: OpenData, config: DataConfig, *, end: int, length: str, eval_sequences: int) -> list[Advice]:
    """Return likely mistakes in a run's data.

    A source is repeated too often if it goes through more than `MOST_EPOCHS` epochs, or through more than one and more
    than `MOST_UNEVEN` times as many as another source.

    Args:
        data: the run's data.
        config: the `data` section.
        end: number of samples of the whole run.
        length: setting that determines the length of the run, with its value.
        eval_sequences: number of sequences requested from each validation source.
    """
    return [
        *_weights_advice(data, config),
        *_repeats_advice(data, end, length),
        *_validation_advice(data, config, eval_sequences),
    ]


def _weights_advice(data: OpenData, config: DataConfig) -> list[Advice]:
    bare = [f"data.train[{place}]" for place, entry in enumerate(config.train) if entry.weight is None]
    found = []
    if bare and len(bare) < len(config.train):
        found.append(
            Advice(
                f"{_listed(bare)} {'has' if len(bare) == 1 else 'have'} no weight beside sources that do, and "
                f"{'counts' if len(bare) == 1 else 'count'} as weight 1",
                "give every source a weight, or none to share by size",
            )
        )
    for source in data.sources:
        if len(source.keys) > 1:
            found.append(
                Advice(
                    f"{_listed(source.keys)} hold the same text, and are drawn from as one source with their shares "
                    "added",
                    "list it once, with the weight it should have",
                )
            )
    return found


def _repeats_advice(data: OpenData, end: int, length: str) -> list[Advice]:
    overall, found = _overall_epochs(data, end), []
    if overall > MOST_EPOCHS:
        taken = sum(data.train.drawn_before(end)) * data.train.seq_length
        found.append(
            Advice(
                f"the schedule takes {taken:,} tokens of {data.train_tokens:,}: {overall:.2f} epochs ({length})",
                "watch eval_elbo for overfitting; more text or a shorter schedule helps",
            )
        )
    epochs = data.train.epochs_at(end)
    least = min(range(len(epochs)), key=lambda place: epochs[place])
    for source, times in zip(data.sources, epochs, strict=True):
        is_often = times > MOST_EPOCHS and times > 1.5 * overall
        is_uneven = times > 1 and times > MOST_UNEVEN * epochs[least]
        if is_often or is_uneven:
            found.append(_uneven(source, times, data.sources[least], epochs[least]))
    return found


def _uneven(source: TrainingSource, times: float, least: TrainingSource, least_times: float) -> Advice:
    return Advice(
        f"{source.keys[0]} ({source.label}) is gone through {times:.1f} times by the end, "
        f"{least.keys[0]} ({least.label}) {least_times:.2f} times",
        f"lower its weight, or leave out every weight to share by size; up to {MOST_EPOCHS} epochs are nearly as good "
        "as new text",
    )


def _validation_advice(data: OpenData, config: DataConfig, eval_sequences: int) -> list[Advice]:
    if not data.valid:
        return [
            Advice("data.valid is empty: no held-out bound will be measured", "preprocess a part of the corpus for it")
        ]
    found = []
    for place, source in enumerate(data.valid):
        if (shared := _shared_text(data, place)) is not None:
            found.append(
                Advice(
                    f"data.valid[{place}] ({source.name}) {shared}: the held-out bound is measured on training text",
                    "keep text apart for validation",
                )
            )
        if eval_sequences > source.available:
            found.append(
                Advice(
                    f"eval.sequences is {eval_sequences:,}, but data.valid[{place}] ({source.name}) has "
                    f"{source.available:,} sequences: all of them are measured, and no more",
                    "give more validation text or lower eval.sequences",
                )
            )
    held = sum(source.num_tokens for source in data.valid)
    if held > data.train_tokens:
        found.append(
            Advice(
                f"data.valid has {held:,} tokens, more than the {data.train_tokens:,} of data.train",
                "exchange the two if they are swapped",
            )
        )
    return found


def _shared_text(data: OpenData, place: int) -> str | None:
    """Return a phrase on how a validation source shares text with a training source; None if none is found."""
    valid = data.valid[place].reader
    same = [source for source in data.sources if source.content == valid.content_fingerprint()]
    if same:
        return f"is the same text as {same[0].keys[0]} ({same[0].label})"
    for source in data.sources:
        pairs = len(data.sources) * len(data.valid)
        found, tried = occurring_passages(valid, source.reader, pairs=pairs)
        if 2 * found >= tried:
            return f"has {found} of {tried} passages word for word in {source.keys[0]} ({source.label})"
    return None


def _overall_epochs(data: OpenData, end: int) -> float:
    return sum(data.train.drawn_before(end)) / sum(source.sequences for source in data.sources)


def _listed(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
