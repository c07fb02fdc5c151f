"""Look at data: the contents of indexed sources, or the sequences that a model reads in one step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megadiff.config.command_line import SettingsParser, refuse_unknown
from megadiff.errors import SHOWN_DIGITS, ConfigError, DataError

if TYPE_CHECKING:
    from megadiff.data.indexed_reader import IndexedReader
    from megadiff.data.source_statistics import Excerpt, SourceStatistics
    from megadiff.data.tokenizers import Tokenizer
    from megadiff.run.config import RunConfig

_EPILOG = """examples:
  megadiff inspect_data data/train data/valid --tokenizer data/tokenizer
  megadiff inspect_data data/train --tokenizer data/tokenizer --document 17 --tokens 1000
  megadiff inspect_data --config examples/demo.yaml
  megadiff inspect_data --config examples/demo.yaml --step 120 --sequences 8 --html step_120.html

Prefixes, or a run description without --step, give the figures of the sources: sizes, lengths, repeated documents, also
those that one source shares with an earlier one, entropy, and the beginnings of documents. Every token is read once.
Without a tokenizer the ids are shown. Whether data are sound is the question that `megadiff check_data` answers.

With --step, the sequences of that step are those that training reads, on any layout: if the run has checkpoints, the
sources stand where they were, or will be, in that step. No model is built, and nothing is written but the page.
"""

_SEQUENCES, _DOCUMENTS, _TOKENS = 4, 3, 200


def main() -> None:
    """Read the command line and show sources or a step."""
    parser = _parser()
    arguments = parser.parse_with_settings()
    from megadiff.run.config import RunConfig

    refuse_unknown(arguments, RunConfig)
    _check(arguments)
    config = None
    if arguments.config is not None:
        from megadiff.config.load import load_config

        config = load_config(arguments.config, arguments.overrides, RunConfig)
    if config is not None and arguments.step is not None:
        _show_step(config, arguments)
    else:
        _show_sources(config, arguments)


def _parser() -> SettingsParser:
    parser = SettingsParser(
        settings_help="prefixes P of P.bin and P.idx; with --config, settings over the file's",
        metavar="P or key=value",
        description=__doc__,
        epilog=_EPILOG,
    )
    parser.add_argument("--config", type=Path, help="a run's YAML file: its sources, or with --step its sequences")
    parser.add_argument("--html", type=Path, metavar="F.html", help="also write one page, which needs no network")
    sources = parser.add_argument_group("sources")
    sources.add_argument("--tokenizer", metavar="PATH", help="the word byte, a tokenizer's file or folder")
    sources.add_argument(
        "--documents", type=int, metavar="N", help=f"documents to show of each source (default {_DOCUMENTS})"
    )
    sources.add_argument(
        "--document", type=int, metavar="I", action="append", help="show this document instead; may be repeated"
    )
    sources.add_argument("--tokens", type=int, metavar="N", help=f"tokens to show of each (default {_TOKENS})")
    step = parser.add_argument_group("a step")
    step.add_argument("--step", type=int, metavar="N", help="the step, counted from 1 as in metrics.jsonl")
    step.add_argument("--sequences", type=int, metavar="N", help=f"sequences to show, 0 for all (default {_SEQUENCES})")
    step.add_argument("--table", action="store_true", help="print a line for every token too")
    step.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="as in training")
    step.add_argument("--allow-data-change", action="store_true", help="as in training")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together, or have a wrong value, before anything is read.

    Raises:
        ConfigError, DataError: the first such option.
    """
    if arguments.config is None and not arguments.overrides:
        raise ConfigError("wanted prefixes of indexed data, or --config F with a run description; found neither")
    if arguments.config is None and arguments.step is not None:
        raise ConfigError(f"--step {arguments.step} is a step of a run; give its description with --config F")
    if arguments.config is not None and arguments.tokenizer is not None:
        raise ConfigError("--tokenizer is for prefixes; with --config, set data.tokenizer=PATH")
    of_sources = {"--documents": arguments.documents, "--document": arguments.document, "--tokens": arguments.tokens}
    of_steps = {
        "--sequences": arguments.sequences,
        "--table": arguments.table or None,
        "--allow-change": arguments.allow_change or None,
        "--allow-data-change": arguments.allow_data_change or None,
    }
    wrong, kind = (of_steps, "needs --step") if arguments.step is None else (of_sources, "does not go with --step")
    for option, value in wrong.items():
        if value is not None:
            raise ConfigError(f"{option} {kind}; leave it out{', or give a step' if wrong is of_steps else ''}")
    for option, least in (("documents", 0), ("tokens", 1), ("sequences", 0)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            raise ConfigError(f"--{option} must be at least {least}, got {value}")
    if arguments.html is not None:
        from megadiff.report.markup import check_page_file

        check_page_file("--html", arguments.html)


def _show_step(config: RunConfig, arguments: argparse.Namespace) -> None:
    from megadiff.report.data_page import LEGEND, describe_sequence, describe_step
    from megadiff.run.resume import ResumeOptions
    from megadiff.run.step_sequences import step_sequences

    number = _SEQUENCES if arguments.sequences is None else arguments.sequences
    options = ResumeOptions(allowed=arguments.allow_change, allow_data=arguments.allow_data_change)
    found = step_sequences(config, arguments.step, sequences=number, options=options)
    print("\n".join([*describe_step(found), LEGEND]))
    for sequence in found.sequences:
        lines = describe_sequence(sequence, is_shifted=found.is_shifted, with_table=arguments.table)
        print("\n".join(["", *lines]))
    if arguments.html is not None:
        from megadiff.report.data_page import step_page

        _write(arguments.html, step_page(found, run=config.name))


def _show_sources(config: RunConfig | None, arguments: argparse.Namespace) -> None:
    from megadiff.data.indexed_format import tokenizer_facts
    from megadiff.data.indexed_reader import IndexedReader
    from megadiff.data.preprocess import ProgressReport
    from megadiff.data.source_statistics import evenly, excerpts, statistics_of
    from megadiff.data.tokenizers import token_text
    from megadiff.report.data_page import describe_source

    prefixes = arguments.overrides
    if config is not None:
        prefixes = [source.path for source in (*config.data.training_sources.values(), *config.data.valid)]
    readers = [IndexedReader(prefix) for prefix in dict.fromkeys(prefixes)]
    tokenizers = _tokenizers(readers, config, arguments.tokenizer)
    wanted = _DOCUMENTS if arguments.documents is None else arguments.documents
    shown = [
        excerpts(
            reader,
            arguments.document or evenly(reader.num_documents, wanted),
            tokens=arguments.tokens or _TOKENS,
            tokenizer=tokenizer,
        )
        for reader, tokenizer in zip(readers, tokenizers, strict=True)
    ]
    known = tokenizer_facts(tokenizers[0]) if tokenizers[0] is not None and None not in tokenizers else None
    with ProgressReport("reading", sum(reader.num_tokens for reader in readers)) as progress:
        found = statistics_of(readers, known, lambda done: progress.update(done, "tokens"))
    looks = [None if tokenizer is None else token_text(tokenizer) for tokenizer in tokenizers]
    parts: list[tuple[SourceStatistics, list[Excerpt], Callable[[int], str] | None]] = list(
        zip(found, shown, looks, strict=True)
    )
    print("\n\n".join("\n".join(describe_source(*part)) for part in parts))
    if None in looks:
        print("\nids are shown where no tokenizer is known; --tokenizer PATH decodes them")
    if arguments.html is not None:
        from megadiff.report.data_page import sources_page

        _write(arguments.html, sources_page(parts))


def _tokenizers(readers: list[IndexedReader], config: RunConfig | None, given: str | None) -> list[Tokenizer | None]:
    """Return the tokenizer of each source: the run's, the given one, or bytes where the manifest names them.

    Raises:
        DataError: a source was made with another tokenizer, or holds ids that it does not have.
    """
    from megadiff.data.tokenizers import load_tokenizer, tokenizer_of
    from megadiff.data.tokenizers.byte import ByteTokenizer

    byte = ByteTokenizer()
    if config is None and given is None:
        found: list[Tokenizer | None] = [
            byte if reader.tokenizer_fingerprint == byte.fingerprint else None for reader in readers
        ]
    else:
        tokenizer = tokenizer_of(config.data) if config is not None else load_tokenizer(str(given))
        found = [tokenizer] * len(readers)
    for reader, tokenizer in zip(readers, found, strict=True):
        if tokenizer is None:
            continue
        if reader.manifest is not None and reader.tokenizer_fingerprint != tokenizer.fingerprint:
            made = reader.manifest.tokenizer
            raise DataError(
                f"{reader.prefix}: made with tokenizer {made.name} ({made.fingerprint[:SHOWN_DIGITS]}), found "
                f"{tokenizer.name} ({tokenizer.fingerprint[:SHOWN_DIGITS]}); give the first one's path"
            )
        reader.check_vocabulary(tokenizer.vocab_size, mask_id=tokenizer.mask_id)
    return found


def _write(path: Path, page: str) -> None:
    from megadiff.report.markup import write_page

    write_page("--html", path, page)
    print(f"\n{path}: {len(page.encode()) / 1e6:.1f} MB")
