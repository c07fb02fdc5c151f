"""The options of the commands that read a corpus, and what these commands report of it."""

from __future__ import annotations

import argparse

from megadiff.data.corpus_files import TextFields
from megadiff.data.corpus_streams import CorpusPath, expanded, kind_of
from megadiff.data.documents import MAX_DOCUMENT_BYTES, SPLITS, TEXT_SPLITS, Corpus, DocumentFilters

_MAX_LISTED_FILES = 20
_INPUT_HELP = (
    "corpus files, kept in this order; folders with such files; URLs of both (s3://, gs://, hf://); - for JSON lines "
    "from standard input"
)


def add_corpus_options(parser: argparse.ArgumentParser, *, is_required: bool = True) -> None:
    """Add `--input`, which a command may require later, and the options of `corpus_from`."""
    parser.add_argument("--input", nargs="+", required=is_required, metavar="FILE", help=_INPUT_HELP)
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key or column that holds the text")
    parser.add_argument(
        "--template",
        metavar="T",
        help="text with several keys or columns in braces in place of one, such as '{title}\\n\\n{text}'",
    )
    parser.add_argument(
        "--text-split",
        choices=TEXT_SPLITS,
        default=TEXT_SPLITS[0],
        help="what is one document in a .txt file: the file (default), each line, or what lies between blank lines",
    )
    parser.add_argument(
        "--max-bad-lines",
        type=int,
        default=0,
        metavar="K",
        help="lines or documents without usable text to skip, and list at the end, before refusing (default 0)",
    )
    parser.add_argument(
        "--max-document-mb",
        type=float,
        default=MAX_DOCUMENT_BYTES / 2**20,
        metavar="M",
        help="MiB of one line or document, uncompressed; a longer one is a bad line (default 256)",
    )
    _add_filter_options(parser)


def _add_filter_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min-characters", type=int, default=0, metavar="N", help="leave out shorter documents")
    parser.add_argument("--max-characters", type=int, metavar="N", help="leave out longer documents")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of the documents held out for validation, chosen by a hash of their text",
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default=SPLITS[0],
        help="with --valid-fraction: keep the documents that are not held out (train, the default) or those (valid)",
    )


def corpus_from(arguments: argparse.Namespace, fields: TextFields | None = None) -> Corpus:
    """Return the corpus that the options of `add_corpus_options` describe.

    Args:
        arguments: the command line.
        fields: fields that make a document, in the place of those of the options.
    """
    filters = DocumentFilters(
        min_characters=arguments.min_characters,
        max_characters=arguments.max_characters,
        valid_fraction=arguments.valid_fraction,
        split=arguments.split,
    )
    return Corpus(
        expanded(arguments.input),
        json_key=arguments.json_key,
        template=None if arguments.template is None else unescaped(arguments.template),
        fields=fields,
        text_split=arguments.text_split,
        max_bad_lines=arguments.max_bad_lines,
        max_document_bytes=int(arguments.max_document_mb * 2**20),
        filters=filters,
    )


def unescaped(template: str) -> str:
    """Return a template of the command line with the line ends and tabs that it writes as `\\n` and `\\t`."""
    return template.replace("\\n", "\n").replace("\\t", "\t")


def describe_files(corpus: Corpus) -> list[str]:
    """Return a line for each file that was read, with its number of documents."""
    files = list(zip(corpus.paths, corpus.report.files, strict=True))
    lines = [f"{path}: {file.documents:,} document(s) read" for path, file in files[:_MAX_LISTED_FILES]]
    if len(files) > _MAX_LISTED_FILES:
        rest = sum(file.documents for _, file in files[_MAX_LISTED_FILES:])
        lines.append(f"{len(files) - _MAX_LISTED_FILES} more files: {rest:,} documents read")
    whole = [path for path, _ in files if _is_text(path)]
    if whole and corpus.text_split == TEXT_SPLITS[0]:
        lines.append(
            "note: each .txt file was taken as one document; --text-split line or blank-line makes several of it"
        )
    return lines


def describe_skipped(corpus: Corpus) -> list[str]:
    """Return a line for each bad line that was kept as an example, and for the repaired documents."""
    report = corpus.report
    lines = [f"skipped {example}" for example in report.bad_examples]
    if report.bad_lines > len(report.bad_examples):
        lines.append(f"skipped {report.bad_lines - len(report.bad_examples):,} more bad lines")
    counts = {
        "with fewer than --min-characters": report.too_short,
        "with more than --max-characters": report.too_long,
        "of the other split": report.other_split,
        "that repeat an earlier one": report.duplicates,
    }
    lines += [f"left out {count:,} document(s) {what}" for what, count in counts.items() if count]
    if report.repaired_documents:
        lines.append(
            f"note: in {report.repaired_documents:,} document(s) halves of surrogate pairs, which are no characters, "
            "were replaced by U+FFFD"
        )
    return lines


def _is_text(path: CorpusPath) -> bool:
    return kind_of(path) == ".txt"
