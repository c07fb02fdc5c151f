"""Opening of a run's data, checked against the tokenizer before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from megadiff.data.config import DataConfig, SourceConfig, given_weights
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.mixture import Budgets, Mixture, Position, Source, next_mixture, sample_counts, target_of
from megadiff.data.sequences import (
    Division,
    GrownSequences,
    PackedConversations,
    Padding,
    ShuffledSequences,
    TrainingSequences,
    ValidationSequences,
    as_divided,
    content_of,
    division_of,
    joined_documents,
    joined_masks,
    padding_of,
)
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import SHOWN_DIGITS, DataError

_PASSAGES, _PASSAGE_TOKENS = 8, 128
_MOST_SEARCHED, _LEAST_SEARCHED = 2**24, 2**14
_CHUNK = 2**20
_SPANS, _SPAN_TOKENS = 64, 2**12


def occurring_passages(valid: IndexedReader, train: IndexedReader, *, pairs: int = 1) -> tuple[int, int]:
    """Return the number of passages of a validation source that occur in a training source, and the number searched.

    Eight passages of 128 tokens, evenly spread over the validation source, are searched for in the first 2**24 tokens
    of the training source, or in fewer when many pairs of sources are compared, to keep the start of a run short.

    Args:
        valid: source of the passages.
        train: source to search.
        pairs: number of pairs of sources that are compared in total; they share the work.
    """
    needles = [_encoded(passage, train) for passage in _passages(valid)]
    limit = min(train.num_tokens, max(_MOST_SEARCHED // pairs, _LEAST_SEARCHED))
    found = [False] * len(needles)
    for text in _chunks(train, limit, overlap=_PASSAGE_TOKENS - 1):
        for place, needle in enumerate(needles):
            found[place] = found[place] or (needle is not None and _holds(text, needle, train.dtype.itemsize))
    return sum(found), len(found)


def opening_fingerprint(reader: IndexedReader, tokens: int) -> str:
    """Return a SHA-256 (hex) of the first `tokens` tokens, of which 64 even spans of 4,096 are read.

    It detects that a file has grown: a grown file begins with all its earlier tokens.
    """
    length = min(tokens, _SPAN_TOKENS)
    digest = hashlib.sha256(f"{tokens}".encode())
    for start in sorted({(tokens - length) * i // (_SPANS - 1) for i in range(_SPANS)}):
        digest.update(reader.stored_tokens.read(start, length).astype("<i8").tobytes())
    return digest.hexdigest()


def _passages(reader: IndexedReader) -> list[np.ndarray]:
    """Return passages spread evenly over a source, from its first token to its last, in its stored type."""
    length = min(_PASSAGE_TOKENS, reader.num_tokens)
    number = min(_PASSAGES, reader.num_tokens // length)
    last = reader.num_tokens - length
    return [reader.stored_tokens.read(last * i // max(number - 1, 1), length) for i in range(number)]


def _encoded(passage: np.ndarray, train: IndexedReader) -> bytes | None:
    """Return the passage as the training source would store it; None if its type cannot hold it."""
    stored = passage.astype(train.dtype)
    return stored.tobytes() if np.array_equal(stored.astype(np.int64), passage.astype(np.int64)) else None


def _chunks(reader: IndexedReader, limit: int, *, overlap: int) -> Iterator[bytes]:
    for start in range(0, limit, _CHUNK):
        yield reader.stored_tokens.read(start, min(_CHUNK + overlap, limit - start)).tobytes()


def _holds(text: bytes, needle: bytes, itemsize: int) -> bool:
    """Return whether the needle occurs, aligned to whole tokens."""
    place = text.find(needle)
    while place >= 0 and place % itemsize:
        place = text.find(needle, place + 1)
    return place >= 0


@dataclass(frozen=True)
class TrainingSource:
    """An open training source, with all entries of `data.train` that hold its content."""

    reader: IndexedReader
    content: str
    """SHA-256 (hex) of its content."""
    sequences: int
    """Number of sequences in an epoch."""
    label: str
    """Shortest suffix of its path that distinguishes it from the other sources."""
    keys: tuple[str, ...]
    """Entries with this content, such as `data.train[0]`; several if it is listed again."""
    division: Division
    """Division into sequences."""


@dataclass(frozen=True)
class OpenData:
    """A run's data, opened and checked: those of one phase, followed by those of the next."""

    train: TrainingSequences
    """Sequences of this phase by global sample index."""

    valid: tuple[ValidationSequences, ...]
    """Validation data, one per source of `data.valid`, in that order."""

    fingerprint: str
    """SHA-256 (hex) of all that determines the mixture: contents, order and weights of sources, not their paths."""

    train_tokens: int
    """Number of tokens in the training sources of all phases together."""

    prepended_bos: bool | None
    """Whether each document of the training sources begins with bos; None if the sources differ."""

    sources: tuple[TrainingSource, ...]
    """Training sources of this phase in the order of the configuration, each content once."""

    weights: tuple[float, ...] | None
    """Weight of each source; None if they share by size."""

    mixture: Mixture
    """Names and starts of the sources, which determine `train`."""

    seed: int

    from_step: int = 0
    """Number of steps before this phase."""

    begins_at: int = 0
    """First sample that this phase is planned for."""

    budgets: Budgets | None = None
    """Budgets of the sources; None if none has one."""

    following: OpenData | None = None
    """The data of the next phase; None in the last one."""

    def continued(self, mixture: Mixture) -> OpenData:
        """Return the same data, continued from the positions of a mixture of the same sources; later phases follow it.

        Raises:
            ValueError: the mixture has other sources.
        """
        if [position.content for position in mixture.sources] != self.contents:
            raise ValueError("a mixture of other sources")
        train = _training_sequences(
            self.sources, self.weights, mixture, self.train.seq_length, self.seed, budgets=self.budgets
        )
        data = replace(self, train=train, mixture=mixture)
        if (after := self.following) is None:
            return data
        planned = next_mixture(
            mixture.moved_to(train.drawn_before(after.begins_at)), after.identities, first_sample=after.begins_at
        )
        return replace(data, following=after.continued(planned))

    @property
    def phases(self) -> list[OpenData]:
        """This phase and those that follow."""
        return [self, *([] if self.following is None else self.following.phases)]

    def at(self, sample: int) -> OpenData:
        """Return the data from the phase on that a sample of the run belongs to."""
        return next((phase for phase in reversed(self.phases) if phase.begins_at <= sample), self)

    def end_of_phase(self, end: int) -> int:
        """Return the sample before which this phase ends, in a run of `end` samples."""
        return end if self.following is None else min(end, self.following.begins_at)

    def sequences(self, samples: Sequence[int]) -> np.ndarray:
        """Return the sequences of these samples, of any phases, in their order: [B, L] int64."""
        phases = [self.at(sample) for sample in samples]
        if all(phase is phases[0] for phase in phases[1:]):
            return phases[0].train.sequences(samples)
        found = zip(phases, samples, strict=True)
        return np.concatenate([phase.train.sequences([sample]) for phase, sample in found])

    def predicted(self, samples: Sequence[int]) -> np.ndarray | None:
        """Return which tokens of these samples' sequences are to be predicted, [B, L] bool; None for all."""
        if self.conversations_key is None:
            return None
        return joined_masks([self.at(sample).train.predicted([sample]) for sample in samples], self.train.seq_length)

    def documents(self, samples: Sequence[int]) -> np.ndarray | None:
        """Return the documents of these samples' tokens, [B, L] int64; None if every sequence is one document."""
        if self.packed_key is None:
            return None
        return joined_documents(
            [self.at(sample).train.documents([sample]) for sample in samples], self.train.seq_length
        )

    @cached_property
    def packed_key(self) -> str | None:
        """First entry of the configuration, of any phase, whose conversations share sequences; None if none do."""
        sources = (source for phase in self.phases for source in phase.sources)
        return next((one.keys[0] for one in sources if isinstance(one.division, PackedConversations)), None)

    @cached_property
    def conversations_key(self) -> str | None:
        """First entry of the configuration, of any phase, whose source holds conversations; None if none does."""
        sources = (source for phase in self.phases for source in phase.sources)
        return next((source.keys[0] for source in sources if source.reader.has_spans), None)

    @property
    def chat_templates(self) -> list[str]:
        """SHA-256 (hex) of every chat template, of any phase's sources, that is known; each once, in order."""
        found = (source.reader.chat_template for phase in self.phases for source in phase.sources)
        return sorted({template for template in found if template is not None})

    def mixture_at(self, sample: int) -> Mixture:
        """Return the mixture of a sample, with the positions that its sources have reached before the sample."""
        phase = self.at(sample)
        return phase.mixture.moved_to(phase.train.drawn_before(sample)).at_paths_of(phase.identities)

    def epochs_at(self, sample: int) -> dict[str, float]:
        """Return the number of epochs before a sample, by label, of each source of the phase of the sample before."""
        phase = self.at(sample - 1)
        epochs = phase.train.epochs_at(sample)
        return {source.label: found for source, found in zip(phase.sources, epochs, strict=True)}

    def drawn_at(self, end: int) -> list[tuple[TrainingSource, int]]:
        """Return each source of all phases that begin before a sample, with the sequences it has given before it."""
        found: dict[str, tuple[TrainingSource, int]] = {}
        for phase in self.phases:
            if phase is self or phase.begins_at < end:
                drawn = phase.train.drawn_before(phase.end_of_phase(end))
                for source, number in zip(phase.sources, drawn, strict=True):
                    first, _ = found.get(source.content, (source, 0))
                    found[source.content] = (first, number)
        return list(found.values())

    @property
    def contents(self) -> list[str]:
        """Contents of the sources, as SHA-256 (hex)."""
        return [source.content for source in self.sources]

    @property
    def identities(self) -> list[Source]:
        """The sources in the form that `data.mixture` uses."""
        return _identities(self.sources)


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    seed: int,
    valid_sequences: int,
    full_scan: bool = False,
    samples_before: Callable[[int], int] = lambda step: step,
    samples: int = 0,
) -> OpenData:
    """Open all sources of a new run; `OpenData.continued` moves them to the positions of a resumed run.

    Entries of `data.train` with the same content are one source, whose weights add up (without weights, it counts as
    often as it is listed): it has one order, in which no sequence repeats before every other has come once.

    Args:
        config: the `data` section.
        tokenizer: the run's tokenizer.
        seq_length: L.
        seed: seed of the run; determines the order of the sequences.
        valid_sequences: maximal number of sequences per validation source.
        full_scan: check every token id now instead of some 300 spans per source; the rest is checked when it is read.
        samples_before: returns the number of samples before a step, at which phases begin.
        samples: number of samples of the run, by which budgets are spent.

    Raises:
        DataError: files are missing or damaged, were made with another tokenizer, hold ids outside its vocabulary, or
            less than one sequence.
    """
    padding = padding_of(config.padding, tokenizer, packing=config.packing)
    opened: dict[str, _Opened] = {}
    for key, source in config.training_sources.items():
        if source.path not in opened:
            reader = _checked(key, source.path, tokenizer, full_scan)
            division = division_of(reader, seq_length, padding)
            opened[source.path] = _Opened(reader, content_of(reader, division), division)
    valid = [_checked(f"data.valid[{i}]", source.path, tokenizer, full_scan) for i, source in enumerate(config.valid)]
    every, _ = _distinct(config.training_sources, opened)
    labels = {source.content: source.label for source in every}
    steps = [0, *(phase.from_step for phase in config.phases or ())]
    following = None
    for from_step, (section, train) in reversed(list(zip(steps, config.mixtures.items(), strict=True))):
        named = {f"{section}[{place}]": source for place, source in enumerate(train)}
        sources, weights = _distinct(named, opened)
        sources = tuple(replace(source, label=labels[source.content]) for source in sources)
        begins_at, ends_at = samples_before(from_step), following.begins_at if following is not None else samples
        budgets = _budgets(named, sources, ends_at, seq_length)
        mixture = next_mixture(None, _identities(sources), first_sample=begins_at)
        following = OpenData(
            train=_training_sequences(sources, weights, mixture, seq_length, seed),
            valid=tuple(_validation(reader, seq_length, valid_sequences, padding) for reader in valid),
            fingerprint=_fingerprint(sources, weights, budgets, padding),
            train_tokens=sum(source.reader.num_tokens for source in every),
            prepended_bos=_common([source.reader.prepended_bos for source in every]),
            sources=sources,
            weights=weights,
            mixture=mixture,
            seed=seed,
            from_step=from_step,
            begins_at=begins_at,
            budgets=budgets,
            following=following,
        )
    assert following is not None
    needs_starts = any(phase.budgets is not None or phase.begins_at for phase in following.phases)
    return following.continued(following.mixture) if needs_starts else following


class _Opened(NamedTuple):
    reader: IndexedReader
    content: str
    division: Division


def _distinct(
    entries: Mapping[str, SourceConfig], opened: Mapping[str, _Opened]
) -> tuple[tuple[TrainingSource, ...], tuple[float, ...] | None]:
    """Return the sources, each content once, and their weights; None if no entry has one."""
    places: dict[str, list[str]] = {}
    for key, source in entries.items():
        places.setdefault(opened[source.path].content, []).append(key)
    distinct = [opened[entries[found[0]].path] for found in places.values()]
    labels = shortest_ends([one.reader.prefix for one in distinct])
    sources = tuple(
        TrainingSource(one.reader, one.content, len(one.division), label, tuple(found), one.division)
        for one, found, label in zip(distinct, places.values(), labels, strict=True)
    )
    weights = given_weights(list(entries.values()))
    if weights is None:
        return sources, None
    by_key = dict(zip(entries, weights, strict=True))
    return sources, tuple(sum(by_key[key] for key in found) for found in places.values())


def _training_sequences(
    sources: Sequence[TrainingSource],
    weights: Sequence[float] | None,
    mixture: Mixture,
    seq_length: int,
    seed: int,
    budgets: Budgets | None = None,
) -> TrainingSequences:
    starts, counts = [position.start for position in mixture.sources], None
    if budgets is not None and mixture.first_sample < budgets.ends_at:
        counts = sample_counts(
            budgets,
            first_sample=mixture.first_sample,
            starts=starts,
            weights=weights or [len(source.keys) * source.sequences for source in sources],
            keys=[source.keys[0] for source in sources],
        )
    positions = zip(sources, mixture.sources, strict=True)
    return TrainingSequences(
        [_stream(source, seq_length, position, seed) for source, position in positions],
        weights,
        seed=seed,
        first_sample=mixture.first_sample,
        starts=starts,
        copies=[len(source.keys) for source in sources],
        keys=[source.keys[0] for source in sources],
        counts=counts,
    )


def _budgets(
    entries: Mapping[str, SourceConfig], sources: Sequence[TrainingSource], ends_at: int, seq_length: int
) -> Budgets | None:
    """Return the budgets of a phase; None if no source has one."""
    targets = tuple(
        target_of({key: entries[key] for key in source.keys}, source.sequences, seq_length) for source in sources
    )
    return None if all(target is None for target in targets) else Budgets(targets, ends_at)


def _stream(
    source: TrainingSource, seq_length: int, position: Position, seed: int
) -> ShuffledSequences | GrownSequences:
    if position.parts:
        return GrownSequences(source.reader, seq_length, seed=seed, position=position, division=source.division)
    return ShuffledSequences(source.reader, seq_length, seed=seed, name=position.name, division=source.division)


def _identities(sources: Sequence[TrainingSource]) -> list[Source]:
    def opening(source: TrainingSource, sequences: int) -> str:
        found = opening_fingerprint(source.reader, source.division.extent(sequences))
        return as_divided(found, source.division)

    return [Source(found.reader.prefix, found.content, found.sequences, partial(opening, found)) for found in sources]


def shortest_ends(paths: Sequence[str]) -> list[str]:
    """Return the shortest suffixes of different paths, in whole names, that distinguish them."""
    parts = [path.split("/") for path in paths]
    count = 1
    while len({tuple(part[-count:]) for part in parts}) < len(parts) and count < max(map(len, parts)):
        count += 1
    return ["/".join(part[-count:]) for part in parts]


def _common(values: Sequence[bool]) -> bool | None:
    """Return the value if all are the same; None if they differ."""
    return values[0] if len(set(values)) == 1 else None


def _validation(reader: IndexedReader, seq_length: int, sequences: int, padding: Padding | None) -> ValidationSequences:
    name = reader.prefix.rpartition("/")[2]
    return ValidationSequences(reader, seq_length, num_sequences=sequences, name=name, padding=padding)


def open_validation(
    prefix: str, tokenizer: Tokenizer, *, seq_length: int, sequences: int, key: str, padding: Padding | None = None
) -> ValidationSequences:
    """Open one validation source, for a command without a run's configuration.

    Args:
        prefix: P of `P.bin` and `P.idx`.
        tokenizer: the model's tokenizer.
        seq_length: L.
        sequences: maximal number of sequences.
        key: name of the option that gave the prefix, for messages.
        padding: what fills conversations up, as in the model's run.

    Raises:
        DataError: as for `open_data`.
    """
    remedy = "give data made with the model's tokenizer"
    reader = _checked(key, prefix, tokenizer, full_scan=False, owner="the model's", remedy=remedy)
    return _validation(reader, seq_length, sequences, padding)


def _checked(
    key: str,
    prefix: str,
    tokenizer: Tokenizer,
    full_scan: bool,
    *,
    owner: str = "this run's",
    remedy: str = "set data.tokenizer to the first or preprocess the corpus with the second",
) -> IndexedReader:
    """Open a source and compare it with the tokenizer; `owner` and `remedy` word the message about a mismatch."""
    try:
        reader = IndexedReader(prefix)
        made_with = reader.tokenizer_fingerprint
        if made_with is not None and made_with != tokenizer.fingerprint:
            assert reader.manifest is not None
            raise DataError(
                f"{reader.prefix}: wrong vocabulary for the data: made with tokenizer {reader.manifest.tokenizer.name} "
                f"({made_with[:SHOWN_DIGITS]}), {owner} is {tokenizer.name} "
                f"({tokenizer.fingerprint[:SHOWN_DIGITS]}); {remedy}"
            )
        reader.check_vocabulary(tokenizer.vocab_size, mask_id=tokenizer.mask_id, full=full_scan)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    return reader


def _fingerprint(
    sources: Sequence[TrainingSource],
    weights: Sequence[float] | None,
    budgets: Budgets | None = None,
    padding: Padding | None = None,
) -> str:
    digest = hashlib.sha256()
    if any(source.reader.has_spans for source in sources):
        digest.update(f"padding {padding}\n".encode())
    for place, source in enumerate(sources):
        share = f"{weights[place] / sum(weights):.12g}" if weights is not None else _size_share(sources, source)
        if budgets is not None:
            share = f"{budgets.targets[place] or share} until {budgets.ends_at}"
        digest.update(f"{share} {source.content}\n".encode())
    return digest.hexdigest()


def _size_share(sources: Sequence[TrainingSource], source: TrainingSource) -> str:
    """Return the contribution of sharing by size to the fingerprint; a single source is the same with a weight."""
    return "1" if len(sources) == 1 else f"by size x {len(source.keys)}"
