"""Cost of noising a million tokens in seconds of one core, compared with its plain form and with reading the tokens."""

from __future__ import annotations

import argparse
import os
import platform as host
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from processor import processor

from megadiff.config.command_line import CommandParser
from megadiff.data.indexed_format import tokenizer_facts
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.indexed_writer import IndexedWriter
from megadiff.data.sequences import ValidationSequences
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.diffusion import noising
from megadiff.diffusion.config import ConditioningConfig
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.noising import noise_batch
from megadiff.diffusion.philox import Stream, Words, philox4x32
from megadiff.diffusion.processes.gidd_snr import SHIFTS
from megadiff.errors import run_command

_EPILOG = """example:
  OMP_NUM_THREADS=1 python tools/benchmarks/noising.py --sequences 1 4 16 64

"machine code" is what a long run uses where numba is installed (without it the column is empty), "numpy" what it uses
otherwise. "reading" makes int64 sequences from indexed binaries that are cached in memory. "plain" is numpy's noising
with every random word made by the definition, `philox4x32`. All times are CPU time of the process. Each round measures
everything once. Ratios are medians of the ratios within a round, so that a busy machine affects both sides.
"""

_KINDS = ("masked", "balanced", "uniform")
_PRESETS = ("none", "as_described")
_MASK, _PAD, _FIRST_WORD = 3, 2, 4


def main() -> None:
    """Measure every kind of noise with every number of sequences, and print the table."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[4, 16], help="sequences of a microbatch (default 4 16)"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default 2048)")
    parser.add_argument("--vocab-size", type=int, default=131072, help="entries, the mask included (default 131072)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--tokens", type=int, default=2**19, help="tokens of each measurement (default 524288)")
    arguments = parser.parse_args()

    print(f"{processor()}, {os.cpu_count()} cores; Python {host.python_version()}, numpy {version('numpy')}")
    print(f"sequences of {arguments.length} tokens, vocabulary {arguments.vocab_size}, {arguments.repeats} rounds\n")
    print("Seconds per million tokens:\n")
    print(
        "| sequences | conditioning | noise | machine code | numpy | reading | numpy / machine code | plain / numpy |"
    )
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        reader = _written(Path(folder) / "words", arguments.tokens, arguments.vocab_size)
        for sequences in arguments.sequences:
            for line in _measured(reader, sequences, arguments):
                print(f"| {sequences} | {line}", flush=True)


def _measured(reader: IndexedReader, sequences: int, arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the rest of each line of the table for microbatches of `sequences` sequences."""
    length, calls = arguments.length, max(1, arguments.tokens // (sequences * arguments.length))
    source = ValidationSequences(reader, length, num_sequences=sequences * calls, name="words")
    clean = source.sequences([number % len(source) for number in range(sequences)])
    million, code = sequences * calls * length / 1e6, noising.load_kernel()

    def read(call: int) -> None:
        source.sequences([(call * sequences + sequence) % len(source) for sequence in range(sequences)])

    for preset in _PRESETS:
        for kind in _KINDS:
            process = HybridMixing(arguments.vocab_size, _MASK, SHIFTS[kind])
            noise = _noising(clean, process, ConditioningConfig(preset=preset))
            found: list[tuple[float, float, float, float]] = []
            for number in range(arguments.repeats + 1):
                noising.kernel = noising.Kernel(module=code, is_settled=True)
                fast, reading = _cpu_s(noise, calls) / million, _cpu_s(read, calls) / million
                noising.kernel = noising.Kernel(is_settled=True)
                numpy = _cpu_s(noise, calls) / million
                with _plain_words():
                    plain = _cpu_s(noise, calls) / million
                if number:  # the first round fills caches
                    found.append((fast, numpy, reading, plain))
            fast, numpy, reading = (statistics.median(times[place] for times in found) for place in range(3))
            gain = statistics.median(numpy / fast for fast, numpy, _, _ in found)
            short = statistics.median(plain / numpy for _, numpy, _, plain in found)
            shown = ("", "") if code is None else (f"{fast:.4f}", f"{gain:.1f}")
            yield f"{preset} | {kind} | {shown[0]} | {numpy:.3f} | {reading:.4f} | {shown[1]} | {short:.1f} |"


def _noising(
    clean: npt.NDArray[np.int64], process: NoiseProcess, conditioning: ConditioningConfig
) -> Callable[[int], object]:
    """Return a function that noises the sequences as those of the n-th microbatch of a run."""
    sequences = len(clean)

    def noise(call: int) -> object:
        return noise_batch(
            clean,
            seed=0,
            sample_index=range(call * sequences, (call + 1) * sequences),
            process=process,
            conditioning=conditioning,
            global_batch=256,
            pad_id=_PAD,
        )

    return noise


def _cpu_s(work: Callable[[int], object], calls: int) -> float:
    began = time.process_time()
    for call in range(calls):
        work(call)
    return time.process_time() - began


@contextmanager
def _plain_words() -> Iterator[None]:
    """Make every stream compute its words by the definition, all four of them."""

    def plain(
        self: Stream, sequences: npt.NDArray[np.int64], positions: int, *, draw: int = 0, count: int = 4
    ) -> Words:
        index, position = sequences.astype(np.uint64)[:, None], np.arange(positions, dtype=np.uint64)[None, :]
        low, high = index & np.uint64(2**32 - 1), index >> np.uint64(32)
        words = philox4x32((position, np.full((1, 1), draw, dtype=np.uint64), low, high), self.key)
        return tuple(np.broadcast_to(word, (len(sequences), positions)) for word in words)[:count]

    short, Stream.words = Stream.words, plain
    try:
        yield
    finally:
        Stream.words = short


def _written(prefix: Path, tokens: int, vocab_size: int) -> IndexedReader:
    """Write random ids as indexed binaries and open them."""
    ids = np.random.default_rng(0).integers(_FIRST_WORD, vocab_size, tokens)
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        writer.add_document(ids)
        writer.finish(tokenizer=tokenizer_facts(ByteTokenizer()), source_bytes=tokens)
    return IndexedReader(prefix)


if __name__ == "__main__":
    run_command(main)
