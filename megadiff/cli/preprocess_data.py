"""Tokenize a corpus into indexed binaries."""

from __future__ import annotations

import sys

from megadiff.config.command_line import CommandParser
from megadiff.data.documents import add_corpus_options, corpus_from, describe_files, describe_skipped
from megadiff.data.preprocess import DocumentMarkers, preprocess

_EXAMPLE = """example:
  megadiff preprocess_data --input corpus/*.jsonl.zst --output-prefix data/corpus \\
      --tokenizer tokenizers/bpe-32k --append-eod --workers 8
"""


def main() -> None:
    """Read the arguments, tokenize, and print what was written."""
    parser = CommandParser(
        description="Tokenize jsonl, txt or parquet files (.gz and .zst too) into P.bin, P.idx and P.json.",
        epilog=_EXAMPLE,
    )
    add_corpus_options(parser)
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="the word byte, a tokenizer file or folder")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text token")
    parser.add_argument("--prepend-bos", action="store_true", help="start each document with the begin-of-text token")
    parser.add_argument("--overwrite", action="store_true", help="replace finished data of the same prefix")
    args = parser.parse_args()

    corpus = corpus_from(args)
    framing = DocumentMarkers(prepend_bos=args.prepend_bos, append_eod=args.append_eod)
    done = preprocess(
        corpus, args.output_prefix, args.tokenizer, framing=framing, workers=args.workers, overwrite=args.overwrite
    )
    report, manifest = done.report, done.manifest
    for line in describe_skipped(corpus):
        print(line, file=sys.stderr)
    for line in describe_files(corpus):
        print(line)
    print(
        f"wrote {args.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.tokens / max(1e-9, done.elapsed_s):,.0f} tokens/s, "
        f"{manifest.source_bytes / manifest.tokens:.3f} bytes/token "
        f"({report.empty_documents} empty documents and {report.bad_lines} bad lines skipped)"
    )
