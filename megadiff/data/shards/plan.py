"""The plan of a folder of shards: inputs, settings, and the units of work that these determine.

A unit is a range of whole lines of one large uncompressed file, or some whole files in their order. The cuts follow
from the inputs and the unit size alone, so every process on every node finds the same units.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path

import orjson
from pydantic import Field, ValidationError

from megadiff.config.section import Section
from megadiff.data.conversations import ConversationOptions
from megadiff.data.corpus_streams import JSON_SUFFIXES, STDIN, CorpusPath, RemotePath, corpus_path, line_start
from megadiff.data.documents import Corpus, DocumentFilters
from megadiff.data.indexed_format import TokenizerFacts, tokenizer_facts
from megadiff.data.preprocess import DocumentMarkers
from megadiff.data.tokenizers import Tokenizer
from megadiff.errors import SHOWN_DIGITS, DataError
from megadiff.files import UnreadableFileError, first_fault, read_bytes, why

PLAN_VERSION = 1
"""Version of the plan's layout."""

UNIT_BYTES = 2**28
"""Default size of a unit: a minute of work for one core, and what a killed worker loses at most."""

_MAX_PLAN_BYTES = 2**30


class PlannedInput(Section):
    """One corpus file as it was when the folder was begun."""

    path: str
    """Absolute path, or URL."""

    bytes: int = Field(ge=0)
    """Size in bytes."""

    mtime_ns: int | None = None
    """Time of the last change, in nanoseconds since 1970; None for a URL."""

    version: str | None = None
    """Name and value that differ between the versions of a file in a store; None where there is no such value."""

    def describe(self) -> str:
        """Return size and time in words."""
        if self.mtime_ns is None:
            return f"{self.bytes:,} bytes of {self.version or 'an unnamed version'}"
        changed = datetime.fromtimestamp(self.mtime_ns / 1e9, tz=timezone.utc)
        return f"{self.bytes:,} bytes of {changed:%Y-%m-%d %H:%M:%S.%f} UTC"


class PlannedUnit(Section):
    """One unit of work, which becomes one shard."""

    first: int = Field(ge=0)
    """Number of its first input."""

    count: int = Field(gt=0)
    """Number of inputs."""

    start: int = Field(default=0, ge=0)
    """First byte of a range."""

    end: int | None = None
    """End of a range of one input, in bytes; None for whole files."""


class PlanSettings(Section):
    """The options that decide which tokens come out."""

    json_key: str
    """Key or column that holds the text."""

    template: str | None
    """Text with several keys or columns in braces."""

    text_split: str
    """Way to cut a `.txt` file into documents."""

    max_document_bytes: int
    """Size above which a document is a bad line."""

    append_eod: bool
    """Whether eos ends each document."""

    prepend_bos: bool
    """Whether bos starts each document."""

    unit_bytes: int = Field(gt=0)
    """Size of a unit."""

    min_characters: int
    """Least number of characters of a document."""

    max_characters: int | None
    """Largest number of characters of a document."""

    valid_fraction: float
    """Share of the documents that is held out for validation."""

    split: str
    """Split to keep."""

    drop_duplicates: bool
    """Whether documents that repeat an earlier one are left out."""

    conversations: ConversationOptions | None = None
    """Conversations that the documents hold; None for text."""


_OPTIONS = {"conversations": "conversations", "max_document_bytes": "--max-document-mb", "unit_bytes": "--unit-mb"}


class ShardPlan(Section):
    """The content of `plan.json`."""

    version: int = PLAN_VERSION
    """Version of the plan's layout."""

    tokenizer: TokenizerFacts
    """The tokenizer."""

    settings: PlanSettings
    """Options that decide which tokens come out."""

    inputs: tuple[PlannedInput, ...]
    """Corpus files in their order."""

    units: tuple[PlannedUnit, ...]
    """Units in the order of the text."""

    @property
    def framing(self) -> DocumentMarkers:
        """Tokens put around each document."""
        return DocumentMarkers(
            prepend_bos=self.settings.prepend_bos,
            append_eod=self.settings.append_eod,
            conversations=self.settings.conversations,
        )

    def bytes_of(self, unit: PlannedUnit) -> int:
        """Return the number of input bytes of a unit, as stored."""
        if unit.end is not None:
            return unit.end - unit.start
        return sum(file.bytes for file in self.inputs[unit.first : unit.first + unit.count])

    def corpus_of(self, unit: PlannedUnit, *, max_bad_lines: int) -> Corpus:
        """Return the documents of a unit."""
        paths = [file.path for file in self.inputs[unit.first : unit.first + unit.count]]
        return self._corpus(paths, max_bad_lines, None if unit.end is None else (unit.start, unit.end))

    def _corpus(self, paths: Sequence[str], max_bad_lines: int, span: tuple[int, int] | None) -> Corpus:
        return Corpus(
            paths,
            json_key=self.settings.json_key,
            template=self.settings.template,
            fields=None if self.settings.conversations is None else self.settings.conversations.fields,
            text_split=self.settings.text_split,
            max_bad_lines=max_bad_lines,
            max_document_bytes=self.settings.max_document_bytes,
            filters=DocumentFilters(
                min_characters=self.settings.min_characters,
                max_characters=self.settings.max_characters,
                valid_fraction=self.settings.valid_fraction,
                split=self.settings.split,
            ),
            span=span,
        )

    def refuse_changed(self, unit: PlannedUnit, folder: Path) -> None:
        """Refuse to read a unit whose files are not those of the plan.

        Raises:
            DataError: one has changed since the folder was begun.
        """
        for planned in self.inputs[unit.first : unit.first + unit.count]:
            found = planned_input(corpus_path(planned.path), is_fresh=True)
            if found != planned:
                raise _changed(folder, planned, found)

    def refuse_other(self, now: ShardPlan, folder: Path) -> None:
        """Refuse to continue a folder with another tokenizer, other options or other inputs.

        Args:
            now: the plan that the present command would make.
            folder: the folder of shards, for messages.

        Raises:
            DataError: they differ; the message names the first difference.
        """
        if now.tokenizer.fingerprint != self.tokenizer.fingerprint:
            then, other = (
                f"{facts.name} ({facts.fingerprint[:SHOWN_DIGITS]})" for facts in (self.tokenizer, now.tokenizer)
            )
            raise DataError(
                f"{folder}: wanted the tokenizer that it was begun with, {then}, found {other}; give that tokenizer or "
                "another --shards folder"
            )
        for name, then in self.settings:
            if (found := getattr(now.settings, name)) != then:
                option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
                raise DataError(
                    f"{folder}: wanted {option} as it was begun, {then}, found {found}; repeat the command that began "
                    "it or give another --shards folder"
                )
        for then, found in zip(self.inputs, now.inputs, strict=False):
            if then.path != found.path:
                raise DataError(
                    f"{folder}: wanted {then.path}, with which it was begun, found {found.path} in its place after "
                    "--input; give the same files in the same order or another --shards folder"
                )
            if then != found:
                raise _changed(folder, then, found)
        if len(self.inputs) != len(now.inputs):
            raise DataError(
                f"{folder}: wanted the {len(self.inputs)} input files that it was begun with, found "
                f"{len(now.inputs)}; give the same files or another --shards folder"
            )


def _changed(folder: Path, then: PlannedInput, found: PlannedInput) -> DataError:
    return DataError(
        f"{then.path}: changed since {folder} was begun: wanted {then.describe()}, found {found.describe()}; restore "
        "the file or give another --shards folder"
    )


def planned_input(path: CorpusPath, *, is_fresh: bool = False) -> PlannedInput:
    """Return a corpus file as it is now.

    Args:
        path: the file.
        is_fresh: ask a store again, past what it has said of the file before.

    Raises:
        DataError: it is gone, no plain file, or in a store that does not give its size.
    """
    if isinstance(path, RemotePath):
        facts = path.facts(is_fresh=is_fresh)
        if facts.bytes is None:
            raise DataError(f"{path}: wanted a file of known size for --shards, found none; use --output-prefix")
        return PlannedInput(path=str(path), bytes=facts.bytes, version=facts.version)
    if path == STDIN:
        raise DataError("--input -: wanted files for --shards, found standard input; use --output-prefix")
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
    if not path.is_file():
        raise DataError(f"{path}: wanted a plain file for --shards, found a pipe; use --output-prefix alone")
    return PlannedInput(path=os.path.abspath(path), bytes=found.st_size, mtime_ns=found.st_mtime_ns)


def make_plan(
    corpus: Corpus,
    tokenizer: Tokenizer,
    framing: DocumentMarkers,
    *,
    unit_bytes: int,
    drop_duplicates: bool = False,
) -> ShardPlan:
    """Return the plan for a corpus.

    Raises:
        DataError: an input cannot be read, or the unit size is below 1.
    """
    if unit_bytes < 1:
        raise DataError("--unit-mb must be above 0; correct the command")
    inputs = [planned_input(path) for path in corpus.paths]
    return ShardPlan(
        tokenizer=tokenizer_facts(tokenizer),
        settings=PlanSettings(
            json_key=corpus.json_key,
            template=corpus.template,
            text_split=corpus.text_split,
            max_document_bytes=corpus.max_document_bytes,
            append_eod=framing.append_eod,
            prepend_bos=framing.prepend_bos,
            unit_bytes=unit_bytes,
            min_characters=corpus.filters.min_characters,
            max_characters=corpus.filters.max_characters,
            valid_fraction=corpus.filters.valid_fraction,
            split=corpus.filters.split,
            drop_duplicates=drop_duplicates,
            conversations=framing.conversations,
        ),
        inputs=tuple(inputs),
        units=tuple(_units(inputs, corpus.text_split, unit_bytes)),
    )


def _units(inputs: Sequence[PlannedInput], text_split: str, unit_bytes: int) -> list[PlannedUnit]:
    """Cut large files of lines at the first line after each multiple of the unit size; join small files."""
    units: list[PlannedUnit] = []
    first, held = 0, 0
    for place, file in enumerate(inputs):
        is_cut = file.bytes > unit_bytes and _has_lines(file.path, text_split)
        if place > first and (is_cut or held + file.bytes > unit_bytes):
            units.append(PlannedUnit(first=first, count=place - first))
            first, held = place, 0
        held += file.bytes
        if is_cut:
            path = corpus_path(file.path)
            cuts = sorted({line_start(path, at) for at in range(0, file.bytes, unit_bytes)} | {file.bytes})
            units += [PlannedUnit(first=place, count=1, start=a, end=b) for a, b in pairwise(cuts)]
            first, held = place + 1, 0
    if first < len(inputs):
        units.append(PlannedUnit(first=first, count=len(inputs) - first))
    return units


def _has_lines(path: str, text_split: str) -> bool:
    """Return whether a file is uncompressed and each of its lines is a document."""
    suffix = corpus_path(path).suffix.lower()
    return suffix in JSON_SUFFIXES or (suffix == ".txt" and text_split == "line")


def read_plan(path: Path) -> ShardPlan | None:
    """Return the content of `plan.json`; None if there is no such file.

    Raises:
        DataError: the file is not a plan, or of another version.
    """
    remedy = "remove the folder and begin again"
    try:
        found = orjson.loads(read_bytes(path, max_bytes=_MAX_PLAN_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path}: the plan {why(error)}; {remedy}") from error
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: the plan is not JSON ({error}); {remedy}") from error
    version = found.get("version") if isinstance(found, dict) else None
    if version != PLAN_VERSION:
        raise DataError(f"{path}: wanted a plan of version {PLAN_VERSION}, found {version}; {remedy}")
    try:
        return ShardPlan.model_validate(found)
    except ValidationError as error:
        key, rule = first_fault(error)
        raise DataError(f"{path}: `{key}` in the plan: {rule}; {remedy}") from error


def plan_bytes(plan: ShardPlan) -> bytes:
    """Return the file's content: JSON, identical for identical plans."""
    return orjson.dumps(plan.model_dump(mode="json"), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
