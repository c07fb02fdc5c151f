"""Tokenize a corpus into indexed binaries; a thin shell around megadiff.data.preprocess."""

from __future__ import annotations

import sys

from megadiff.config.command_line import CommandParser
from megadiff.data.documents import MAX_DOCUMENT_BYTES, Corpus
from megadiff.data.preprocess import Framing, preprocess
from megadiff.errors import run_command

_EXAMPLE = """example:
  python tools/preprocess_data.py --input corpus/*.jsonl.zst --output-prefix data/corpus \\
      --tokenizer tokenizers/bpe-32k --append-eod --workers 8
"""


def main() -> None:
    """Read the arguments, tokenize, and say what was written."""
    parser = CommandParser(
        description="Tokenize jsonl, txt or parquet files (.gz and .zst too) into P.bin, P.idx and P.json.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="corpus files, kept in this order")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="the word byte, a tokenizer file or folder")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key or column that holds the text")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text token")
    parser.add_argument("--prepend-bos", action="store_true", help="start each document with the begin-of-text token")
    parser.add_argument("--max-bad-lines", type=int, default=0, metavar="K", help="bad lines to skip before refusing")
    parser.add_argument(
        "--max-document-mb",
        type=float,
        default=MAX_DOCUMENT_BYTES / 2**20,
        metavar="M",
        help="MiB of one line or text file, uncompressed; a longer one is a bad line (default 256)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace finished data of the same prefix")
    args = parser.parse_args()

    corpus = Corpus(
        args.input,
        json_key=args.json_key,
        max_bad_lines=args.max_bad_lines,
        max_document_bytes=int(args.max_document_mb * 2**20),
    )
    framing = Framing(prepend_bos=args.prepend_bos, append_eod=args.append_eod)
    done = preprocess(
        corpus, args.output_prefix, args.tokenizer, framing=framing, workers=args.workers, overwrite=args.overwrite
    )
    report, manifest = done.report, done.manifest
    for example in report.bad_examples:
        print(f"skipped {example}", file=sys.stderr)
    print(
        f"wrote {args.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.tokens / max(1e-9, done.elapsed_s):,.0f} tokens/s, "
        f"{manifest.source_bytes / manifest.tokens:.3f} bytes/token "
        f"({report.empty_documents} empty documents and {report.bad_lines} bad lines skipped)"
    )


if __name__ == "__main__":
    run_command(main)
