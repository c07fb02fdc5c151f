"""Tokenize a corpus into indexed binaries."""

from __future__ import annotations

import argparse
import sys
import time

from megadiff.config.command_line import CommandParser
from megadiff.config.nodes import COMMAND_LINE
from megadiff.data.conversations import add_conversation_options, conversations_from
from megadiff.data.corpus_options import (
    add_corpus_options,
    corpus_from,
    describe_files,
    describe_skipped,
)
from megadiff.data.documents import Corpus, sample
from megadiff.data.indexed_format import IndexedManifest
from megadiff.data.preprocess import DocumentMarkers, preprocess
from megadiff.data.tokenizers import BACKENDS, Tokenizer, chosen_backend
from megadiff.errors import ConfigError

_EXAMPLE = """examples:
  megadiff preprocess_data --input corpus/*.jsonl.zst --output-prefix data/corpus \\
      --tokenizer tokenizers/bpe-32k --append-eod --workers 8

  A large corpus in shards: the same command again, also on other machines at the same time, continues it. The folder
  is data as it is (data.train: [data/web]), or is merged into one file.
  megadiff preprocess_data --input corpus/*.jsonl --shards data/web --tokenizer tokenizers/bpe-32k --workers 64
  megadiff preprocess_data --merge data/web --output-prefix data/web-merged

  Conversations for fine-tuning, of which only the answers are predicted:
  megadiff preprocess_data --input chats.jsonl --chat-key messages --output-prefix data/chats --tokenizer qwen
"""


def main() -> None:
    """Read the arguments, tokenize or merge, and print what was written."""
    args = _parser().parse_args()
    _refuse_mixture(args)
    if args.merge is not None:
        from megadiff.data.shards.finish import merge

        manifest = merge(args.merge, args.output_prefix, overwrite=args.overwrite)
        print(f"wrote {args.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    elif args.shards is not None:
        _make_shards(args)
    else:
        framing = _framing(args)
        corpus = _corpus(args, framing)
        backend, tokenizer = _backend(args, corpus)
        done = preprocess(
            corpus,
            args.output_prefix,
            args.tokenizer,
            framing=framing,
            workers=args.workers,
            backend=backend,
            tokenizer=tokenizer,
            drop_duplicates=args.drop_duplicates,
            overwrite=args.overwrite,
        )
        _describe(args.output_prefix, corpus, done.manifest, done.manifest.tokens / max(1e-9, done.elapsed_s))


def _parser() -> CommandParser:
    parser = CommandParser(
        description="Tokenize jsonl, txt, csv, parquet or arrow files (also compressed) into P.bin, P.idx and P.json.",
        epilog=_EXAMPLE,
    )
    add_corpus_options(parser, is_required=False)
    add_conversation_options(parser)
    parser.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="leave out documents whose text an earlier one has; reads the input twice",
    )
    parser.add_argument("--output-prefix", metavar="P", help="writes P.bin, P.idx and P.json")
    parser.add_argument(
        "--shards",
        metavar="DIR",
        help="writes or continues a folder of shards instead; any number of machines may work on it at the same time",
    )
    parser.add_argument("--merge", metavar="DIR", help="writes P from a finished folder of shards; needs no --input")
    parser.add_argument("--tokenizer", metavar="PATH", help="the word byte, a tokenizer file or folder")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="library that encodes text; auto: the faster gigatoken, if it proves to give the same ids",
    )
    parser.add_argument(
        "--unit-mb",
        type=float,
        metavar="M",
        help="MiB of input in a shard, as stored (default 256); large uncompressed jsonl files are cut",
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text token")
    parser.add_argument("--prepend-bos", action="store_true", help="start each document with the begin-of-text token")
    parser.add_argument("--overwrite", action="store_true", help="replace finished data of the same prefix")
    return parser


def _refuse_mixture(args: argparse.Namespace) -> None:
    """Refuse options that do not belong together.

    Raises:
        ConfigError: an option is missing, or has no meaning beside the others.
    """
    if args.merge is not None:
        wanted, barred, why = (
            ("output_prefix",),
            ("shards", "input", "tokenizer", "unit_mb", "drop_duplicates"),
            "with --merge",
        )
    elif args.shards is not None:
        wanted, barred, why = ("input", "tokenizer"), ("output_prefix", "overwrite"), "with --shards"
    else:
        wanted, barred, why = (
            ("input", "output_prefix", "tokenizer"),
            ("unit_mb",),
            "without --shards",
        )
    missing = [_option(name) for name in wanted if getattr(args, name) is None]
    if missing:
        either = (
            "; give --output-prefix P, or --shards DIR" if missing == ["--output-prefix"] and not args.merge else ""
        )
        raise ConfigError(f"{COMMAND_LINE}: the following arguments are required: {', '.join(missing)}{either}")
    extra = [_option(name) for name in barred if getattr(args, name)]
    if extra:
        remedy = "merge the finished folder with --merge DIR" if "--output-prefix" in extra else f"drop {extra[0]}"
        raise ConfigError(f"{COMMAND_LINE}: {extra[0]} has no meaning {why}; {remedy}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _framing(args: argparse.Namespace) -> DocumentMarkers:
    return DocumentMarkers(
        prepend_bos=args.prepend_bos, append_eod=args.append_eod, conversations=conversations_from(args)
    )


def _corpus(args: argparse.Namespace, framing: DocumentMarkers) -> Corpus:
    return corpus_from(args, None if framing.conversations is None else framing.conversations.fields)


def _backend(args: argparse.Namespace, corpus: Corpus) -> tuple[str, Tokenizer | None]:
    """Return the library to use and, if it was chosen, the tokenizer with it; say why it is not the faster one."""
    if args.backend == BACKENDS[0] or args.chat_key is not None or args.prompt_key is not None:
        return BACKENDS[0], None
    chosen = chosen_backend(args.backend, args.tokenizer, sample(corpus))
    if chosen.reason is not None:
        print(f"note: the library tokenizers is used instead of gigatoken: {chosen.reason}", file=sys.stderr)
    return chosen.name, chosen.tokenizer


def _make_shards(args: argparse.Namespace) -> None:
    from megadiff.data.shards.finish import finish, report_of
    from megadiff.data.shards.plan import UNIT_BYTES
    from megadiff.data.shards.work import make_shards

    started_s = time.monotonic()
    framing = _framing(args)
    corpus = _corpus(args, framing)
    backend, tokenizer = _backend(args, corpus)
    unit_bytes = UNIT_BYTES if args.unit_mb is None else int(args.unit_mb * 2**20)
    tokens = make_shards(
        corpus,
        args.shards,
        args.tokenizer,
        framing=framing,
        workers=args.workers,
        backend=backend,
        tokenizer=tokenizer,
        unit_bytes=unit_bytes,
        drop_duplicates=args.drop_duplicates,
    )
    manifest = finish(args.shards)
    corpus.report = report_of(args.shards)
    _describe(args.shards, corpus, manifest, tokens / max(1e-9, time.monotonic() - started_s))


def _describe(where: str, corpus: Corpus, manifest: IndexedManifest, speed: float) -> None:
    report = corpus.report
    for line in describe_skipped(corpus):
        print(line, file=sys.stderr)
    for line in describe_files(corpus):
        print(line)
    print(
        f"wrote {where}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{speed:,.0f} tokens/s, "
        f"{manifest.source_bytes / manifest.tokens:.3f} bytes/token "
        f"({report.empty_documents} empty documents and {report.bad_lines} bad lines skipped)"
    )
