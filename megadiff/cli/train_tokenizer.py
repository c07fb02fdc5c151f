"""Train a tokenizer with bos, eos, pad and mask at ids 0 to 3."""

from __future__ import annotations

import sys
from pathlib import Path

from megadiff.config.command_line import CommandParser
from megadiff.data.corpus_options import add_corpus_options, corpus_from, describe_files, describe_skipped
from megadiff.data.tokenizer_training import TYPES, train_tokenizer

_EXAMPLE = """example:
  megadiff train_tokenizer --input corpus/*.jsonl.zst --output tokenizers/bpe-32k --vocab-size 32768 --type bpe
"""


def main() -> None:
    """Read the arguments, train, and print where the tokenizer is."""
    parser = CommandParser(
        description="Train a tokenizer on jsonl, txt, csv, parquet or arrow files (also compressed).",
        epilog=_EXAMPLE,
    )
    add_corpus_options(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder for the tokenizer")
    parser.add_argument(
        "--vocab-size", required=True, type=int, metavar="N", help="number of ids, including the four special ones"
    )
    parser.add_argument("--type", choices=TYPES, default="bpe", help="bpe is byte-level; sentencepiece is unigram")
    args = parser.parse_args()

    corpus = corpus_from(args)
    tokenizer = train_tokenizer(
        corpus.documents(),
        args.output,
        kind=args.type,
        vocab_size=args.vocab_size,
        progress=sys.stderr.isatty(),
    )
    report = corpus.report
    for line in describe_skipped(corpus):
        print(line, file=sys.stderr)
    for line in describe_files(corpus):
        print(line)
    print(f"read {report.documents} documents, {report.bytes_read} bytes, {report.bad_lines} bad lines skipped")
    print(f"wrote {args.output}: {args.type}, {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:16]}")
