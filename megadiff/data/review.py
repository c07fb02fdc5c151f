"""Description of a run's data before training: a line per source, changes, and likely mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megadiff.data.config import DataConfig
from megadiff.data.facts import SourceFacts, ValidationFacts
from megadiff.data.mixture import Mixture, Position
from megadiff.data.open import OpenData, TrainingSource, occurring_passages
from megadiff.data.sequences import Conversations, PackedConversations, ValidationSequences, content_of
from megadiff.errors import SHOWN_DIGITS

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
    phases, epochs = data.phases, _overall_epochs(data, end)
    number = len(data.drawn_at(end))
    by = f", shared by {_shared_by(data)}" if len(phases) == 1 else f" and {len(phases)} phases"
    sources = f" in {number} sources{by}" if number > 1 else ""
    lines = [f"data              {data.train_tokens:,} tokens to train on{sources}: {epochs:.2f} epochs at the end"]
    for phase in phases:
        until, when = phase.end_of_phase(end), "at the end"
        if len(phases) > 1:
            when = "at its end" if phase.following is not None else when
            lines.append(
                f"phase             from step {phase.from_step:,} on, {until - max(phase.begins_at, now):,} samples to "
                f"come, shared by {_shared_by(phase)}"
            )
        for found in phase_facts(phase, now=max(now, phase.begins_at), end=until):
            so_far = f"{found.epochs_now:.2f} epochs so far, " if now or phase.begins_at else ""
            lines.append(
                f"  {found.key:<15} {found.source}: {found.tokens:,} tokens, {found.sequences:,} sequences, "
                f"share {found.share:.2%}, {so_far}{found.epochs_at_end:.2f} epochs {when}"
            )
    for source in {source.content: source for phase in phases for source in phase.sources}.values():
        if isinstance(found := source.division, PackedConversations):
            lines.append(
                f"packing           {source.keys[0]} ({source.label}): {found.conversations:,} conversations in "
                f"{len(found):,} sequences, {found.conversations / len(found):.2f} in each; {1 - found.filled:.2%} of "
                "their tokens fill up"
            )
    return lines


def _shared_by(data: OpenData) -> str:
    by = "size" if data.weights is None else "weight"
    return by if data.budgets is None else f"budget and, for the rest, by {by}"


def describe_validation(data: OpenData) -> list[str]:
    """Return a line for each validation source."""
    return [
        f"  {found.key:<15} {found.source}: {found.tokens:,} tokens, {found.sequences:,} sequences, "
        f"{found.measured:,} of them ({found.measured_tokens:,} tokens) measured"
        for found in validation_facts(data)
    ]


def phase_facts(data: OpenData, *, now: int, end: int) -> list[SourceFacts]:
    """Return sizes, share, and epochs before samples `now` and `end` of each training source of one phase."""
    columns = (data.sources, data.train.blend.shares, data.train.epochs_at(now), data.train.epochs_at(end))
    return [_facts(*column) for column in zip(*columns, strict=True)]


def source_facts(data: OpenData, *, now: int, end: int) -> list[SourceFacts]:
    """Return sizes, share of the run, and epochs before samples `now` and `end` of each training source."""
    if data.following is None:
        return phase_facts(data, now=now, end=end)
    so_far = {source.content: number / source.sequences for source, number in data.drawn_at(now)}
    drawn = data.drawn_at(end)
    total = sum(number for _, number in drawn)
    return [
        _facts(source, number / total, so_far.get(source.content, 0.0), number / source.sequences)
        for source, number in drawn
    ]


def _facts(source: TrainingSource, share: float, so_far: float, in_all: float) -> SourceFacts:
    return SourceFacts(
        key=", ".join(source.keys),
        source=source.label,
        tokens=source.reader.num_tokens,
        sequences=source.sequences,
        share=share,
        epochs_now=so_far,
        epochs_at_end=in_all,
    )


def validation_facts(data: OpenData) -> list[ValidationFacts]:
    """Return the size of each validation source, and the part of it that is evaluated."""
    return [
        ValidationFacts(
            key=f"data.valid[{place}]",
            source=source.name,
            tokens=source.num_tokens,
            sequences=source.available,
            measured=len(source),
            measured_tokens=_measured_tokens(source),
        )
        for place, source in enumerate(data.valid)
    ]


def _measured_tokens(source: ValidationSequences) -> int:
    predicted = source.predicted(range(len(source)))
    return len(source) * source.seq_length if predicted is None else int(predicted.sum())


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
    in_all = data.train.drawn_before(data.end_of_phase(end))[place]
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
    sequences, start = data.train.sources[place], data.train.starts[place]
    in_all = data.train.drawn_before(data.end_of_phase(end))[place]
    return in_all - start - (sequences.unseen(start) - sequences.unseen(in_all))


def change_advice(before: Mixture, data: OpenData, *, end: int) -> list[Advice]:
    """Return warnings about a change of the mixture: sources that repeat, and files whose content was replaced."""
    until = data.end_of_phase(end)
    found = [
        Advice(
            f"{source.keys[0]} ({source.label}): {again:,} of the "
            f"{data.train.drawn_before(until)[place] - data.train.starts[place]:,} sequences to come will have been "
            "seen before",
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
        *_conversations_advice(data),
        *_templates_advice(data),
        *_packing_advice(data, config),
        *_repeats_advice(data, end, length),
        *_validation_advice(data, config, eval_sequences),
    ]


def _weights_advice(data: OpenData, config: DataConfig) -> list[Advice]:
    found = []
    for section, entries in config.mixtures.items():
        bare = [
            f"{section}[{place}]"
            for place, entry in enumerate(entries)
            if entry.weight is None and not entry.has_budget
        ]
        if not bare or all(entry.weight is None for entry in entries):
            continue
        found.append(
            Advice(
                f"{_listed(bare)} {'has' if len(bare) == 1 else 'have'} no weight beside sources that do, and "
                f"{'counts' if len(bare) == 1 else 'count'} as weight 1",
                "give every source a weight, or none to share by size",
            )
        )
    for source in (source for phase in data.phases for source in phase.sources):
        if len(source.keys) > 1:
            found.append(
                Advice(
                    f"{_listed(source.keys)} hold the same text, and are drawn from as one source with their shares "
                    "added",
                    "list it once, with the weight it should have",
                )
            )
    return found


def _conversations_advice(data: OpenData) -> list[Advice]:
    """Return what is lost of conversations that are longer than a sequence."""
    found, length = [], data.train.seq_length
    for source in {source.content: source for phase in data.phases for source in phase.sources}.values():
        division = source.division
        if not isinstance(division, Conversations) or not (division.cut or division.left_out):
            continue
        found.append(
            Advice(
                f"{source.keys[0]} ({source.label}): of {source.reader.num_documents:,} conversations {division.cut:,} "
                f"are cut at model.seq_length = {length:,}, and {division.left_out:,} are left out, since all of their "
                "answers would be cut away",
                "raise model.seq_length, or shorten the conversations",
            )
        )
    return found


def _packing_advice(data: OpenData, config: DataConfig) -> list[Advice]:
    """Return a warning about packing where there is nothing to pack."""
    if not config.packing or data.packed_key is not None or any(source.reader.has_spans for source in data.valid):
        return []
    return [
        Advice(
            "data.packing is true, but no source holds conversations: text is one stream, cut at every "
            "model.seq_length tokens",
            "leave data.packing out",
        )
    ]


def _templates_advice(data: OpenData) -> list[Advice]:
    """Return a warning about sources whose messages became text by different chat templates."""
    sources = [source for phase in data.phases for source in phase.sources]
    named = [(source.keys[0], source.reader) for source in sources]
    named += [(f"data.valid[{place}]", source.reader) for place, source in enumerate(data.valid)]
    first: dict[str, str] = {}
    for key, reader in named:
        if reader.chat_template is not None:
            first.setdefault(reader.chat_template, key)
    if len(first) <= 1:
        return []
    return [
        Advice(
            "sources were made with different chat templates: "
            + ", ".join(f"{key} with {template[:SHOWN_DIGITS]}" for template, key in first.items()),
            "preprocess the messages again with one template, if the model is to be asked with one",
        )
    ]


def _repeats_advice(data: OpenData, end: int, length: str) -> list[Advice]:
    overall, found = _overall_epochs(data, end), []
    if overall > MOST_EPOCHS:
        taken, held, unit = sum(number for _, number in data.drawn_at(end)), data.train_tokens, "tokens"
        if data.conversations_key is None:
            taken *= data.train.seq_length
        else:
            held, unit = sum(source.sequences for source, _ in data.drawn_at(end)), "sequences"
        found.append(
            Advice(
                f"the schedule takes {taken:,} {unit} of {held:,}: {overall:.2f} epochs ({length})",
                "watch eval_elbo for overfitting; more text or a shorter schedule helps",
            )
        )
    epochs = [(source, number / source.sequences) for source, number in data.drawn_at(end)]
    least = min(epochs, key=lambda pair: pair[1])
    for source, times in epochs:
        is_often = times > MOST_EPOCHS and times > 1.5 * overall
        is_uneven = times > 1 and times > MOST_UNEVEN * least[1]
        if is_often or is_uneven:
            found.append(_uneven(source, times, *least))
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
    sources = list({source.content: source for phase in data.phases for source in phase.sources}.values())
    same = [source for source in sources if source.content == content_of(valid, source.division)]
    if same:
        return f"is the same text as {same[0].keys[0]} ({same[0].label})"
    for source in sources:
        pairs = len(sources) * len(data.valid)
        found, tried = occurring_passages(valid, source.reader, pairs=pairs)
        if 2 * found >= tried:
            return f"has {found} of {tried} passages word for word in {source.keys[0]} ({source.label})"
    return None


def _overall_epochs(data: OpenData, end: int) -> float:
    drawn = data.drawn_at(end)
    return sum(number for _, number in drawn) / sum(source.sequences for source, _ in drawn)


def _listed(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
