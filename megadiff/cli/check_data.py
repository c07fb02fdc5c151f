"""Check indexed data: every token, hash and document of P.bin, P.idx and P.json."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from megadiff.config.command_line import CommandParser
from megadiff.data.indexed_format import (
    TokenizerFacts,
    bin_path,
    shard_folder,
    shard_prefixes,
    tokenizer_facts,
    without_suffix,
)
from megadiff.data.preprocess import ProgressReport
from megadiff.data.scan import Scan, scan
from megadiff.data.tokenizers import load_tokenizer
from megadiff.errors import DataError

_EPILOG = """example:
  megadiff check_data data/train data/valid --tokenizer data/tokenizer --workers 2

The exit code is 0 if the data can be used for training, 2 if not. Without --tokenizer, ids are compared with the
vocabulary and the mask in the manifest P.json; a file of Megatron's without a manifest has no hashes to compare.
"""


def main() -> None:
    """Read the arguments, scan the data, print the findings.

    Raises:
        DataError: a finding makes the data unusable.
    """
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("prefixes", nargs="+", metavar="P", help="prefix of P.bin and P.idx, or a folder of shards")
    parser.add_argument("--tokenizer", metavar="PATH", help="the run's tokenizer: the word byte, a file or folder")
    parser.add_argument("--workers", type=_positive, default=1, metavar="N", help="threads that check tokens")
    arguments = parser.parse_args()

    tokenizer = tokenizer_facts(load_tokenizer(arguments.tokenizer)) if arguments.tokenizer else None
    scans = _scanned(arguments.prefixes, tokenizer, arguments.workers)
    # Names may contain rich's markup, and outside a terminal rich would fold the table to 80 columns.
    wide = None if sys.stdout.isatty() else 200
    Console(width=wide, markup=False, highlight=False, emoji=False).print(_table(scans))
    for found in scans:
        for finding in found.findings:
            print(finding)
        if found.unlisted:
            print(f"error: {found.prefix}.bin: {found.unlisted:,} more wrong tokens are not listed")
    _conclude(scans)


def _scanned(prefixes: list[str], tokenizer: TokenizerFacts | None, workers: int) -> list[Scan]:
    sizes = [_size(prefix) for prefix in prefixes]
    scans: list[Scan] = []
    with ProgressReport("checking", sum(sizes)) as progress:
        for number, prefix in enumerate(prefixes):
            before = sum(sizes[:number])

            def report(done: int, before: int = before, prefix: str = prefix) -> None:
                progress.update(before + done, prefix)

            scans.append(scan(prefix, tokenizer=tokenizer, workers=workers, progress=report))
    return scans


def _size(prefix: str) -> int:
    folder = shard_folder(without_suffix(prefix))
    paths = [bin_path(path) for path in ([without_suffix(prefix)] if folder is None else shard_prefixes(folder))]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _table(scans: list[Scan]) -> Table:
    table = Table()
    table.add_column("prefix", overflow="fold")
    for name in ("documents", "empty", "tokens", "padding", "dtype", "bytes", "hashes", "errors"):
        table.add_column(name, justify="left" if name in ("dtype", "hashes") else "right")
    for found in scans:
        counts = (found.documents, found.empty_documents, found.tokens, found.padding_tokens)
        sequence = [f"{count:,}" for count in counts]
        table.add_row(found.prefix, *sequence, found.dtype, f"{found.bytes:,}", found.hashes, f"{found.errors:,}")
    return table


def _conclude(scans: list[Scan]) -> None:
    bad = [found for found in scans if found.errors]
    notes = sum(not finding.is_error for found in scans for finding in found.findings)
    if bad:
        errors = sum(found.errors for found in bad)
        named = ", ".join(found.prefix for found in bad)
        raise DataError(f"{errors:,} error(s) in {len(bad)} of {len(scans)} prefix(es), not to be trained on: {named}")
    tokens = sum(found.tokens for found in scans)
    print(f"ok: {len(scans)} prefix(es), {tokens:,} tokens, no errors, {notes} note(s)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
