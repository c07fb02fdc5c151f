"""CPU seconds and time of tokenizing a corpus: one process, shards, merging, and both libraries that encode text."""

from __future__ import annotations

import json
import os
import platform as host
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megadiff.config.command_line import CommandParser
from megadiff.data.documents import Corpus
from megadiff.data.tokenizers import chosen_backend, load_tokenizer
from megadiff.errors import run_command

_KINDS = (
    "library alone",
    "one process",
    "shards, one process",
    "shards, two processes",
    "merging",
    "one process, gigatoken",
)
_EPILOG = """example:
  python tools/benchmarks/preprocess.py --input runs/demo-data/corpus/train.jsonl --tokenizer runs/demo-data/tokenizer

The commands take turns and write the same bytes, which is checked. "library alone" is one call of `encode_batch` of
the library `tokenizers` for each thousand documents in this process, with one thread, and nothing else; "merging" needs
one of the kinds with shards. User and system time of all processes of a command; medians.
"""


def main() -> None:
    """Print the table."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--input", required=True, metavar="FILE", help="a .jsonl file of 100 MB or so")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="as for `megadiff preprocess_data`")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS, metavar="KIND", help="what to measure")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default 3)")
    arguments = parser.parse_args()

    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    texts = list(Corpus([arguments.input]).documents())
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        every = _commands(Path(folder), arguments.input, arguments.tokenizer, texts)
        commands = {name: command for name, command in every.items() if name in arguments.kinds}
        alone = [name for name in _KINDS[:1] if name in arguments.kinds]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in (*alone, *commands)}
        for _ in range(arguments.repeats):
            for name in alone:
                found[name].append(_library_alone(arguments.tokenizer, texts))
            for name, command in commands.items():
                found[name].append(_measured(command))
            _refuse_difference(Path(folder))
    print(f"machine                   {host.machine()}, {os.cpu_count()} cores, Python {host.python_version()}")
    print(f"text                      {size / 1e6:.1f} MB in {len(texts):,} documents, {Path(arguments.input).name}")
    for name, pairs in found.items():
        cpu, elapsed = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"{name:<25} {cpu:6.2f} CPU s {size / cpu / 1e6:7.1f} MB per CPU s {elapsed:7.2f} s")


def _commands(folder: Path, file: str, tokenizer: str, texts: list[str]) -> dict[str, list[str]]:
    """Return the commands; those of the faster library only where it is installed and fits."""
    base = [sys.executable, "-m", "megadiff", "preprocess_data"]
    common = [*base, "--input", file, "--tokenizer", tokenizer, "--append-eod"]
    plain = [*common, "--overwrite", "--output-prefix"]
    shards = [*base[:1], "-c", _FRESH, str(folder / "shards"), *common[1:], "--unit-mb", "8"]
    found = {
        "one process": [*plain, str(folder / "serial")],
        "shards, one process": [*shards, "--shards", str(folder / "shards")],
        "shards, two processes": [*shards, "--shards", str(folder / "shards"), "--workers", "2"],
        "merging": [*base, "--merge", str(folder / "shards"), "--overwrite", "--output-prefix", str(folder / "merged")],
    }
    chosen = chosen_backend("auto", tokenizer, texts[:1000])
    if chosen.name == "gigatoken":
        found["one process, gigatoken"] = [*plain, str(folder / "fast"), "--backend", "gigatoken"]
    else:
        print(f"without gigatoken: {chosen.reason}")
    return found


_FRESH = """
import shutil, subprocess, sys
shutil.rmtree(sys.argv[1], ignore_errors=True)
sys.exit(subprocess.run([sys.executable, *sys.argv[2:]]).returncode)
"""


def _library_alone(tokenizer: str, texts: list[str]) -> tuple[float, float]:
    encode = load_tokenizer(tokenizer).encode_batch
    cpu, begun = time.process_time(), time.perf_counter()
    for start in range(0, len(texts), 1000):
        encode(texts[start : start + 1000])
    return time.process_time() - cpu, time.perf_counter() - begun


def _measured(command: list[str]) -> tuple[float, float]:
    """Return the CPU seconds of a command and its children, and its time."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    elapsed, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, elapsed


def _refuse_difference(folder: Path) -> None:
    """Refuse results of which one has other bytes."""
    manifests = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    first = next(iter(manifests), "")
    for name, manifest in manifests.items():
        if manifest != manifests[first]:
            raise RuntimeError(f"{name} differs from {first}")


if __name__ == "__main__":
    run_command(main)
