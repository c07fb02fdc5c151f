"""A small corpus of several files, one of them cut into ranges, and what one process makes of it."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
from pathlib import Path

from megadiff.data.documents import Corpus
from megadiff.data.preprocess import DocumentMarkers, preprocess

FRAMING = DocumentMarkers(append_eod=True)
UNIT_BYTES = 4000
ENDINGS = (".bin", ".idx", ".json")


def write_files(folder: Path) -> list[Path]:
    """Write a large file with blank lines and a byte-order mark, small ones, a compressed and an empty one."""
    draw = random.Random(3)
    lines = []
    for number in range(150):
        text = " ".join(draw.choices(["fox", "née", "數", "dog", "jumps"], k=draw.randint(0, 60)))
        lines.append(json.dumps({"id": number, "text": text}, ensure_ascii=number % 2 == 0))
        lines += [""] * (number % 31 == 0)
    files = [folder / name for name in ("a.jsonl", "b.jsonl", "c.txt", "d.jsonl.gz", "e.jsonl", "f.jsonl")]
    files[0].write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    files[1].write_text("".join(f"{line}\n" for line in lines[:7]), encoding="utf-8")
    files[2].write_text("a text of\n\nits own")
    files[3].write_bytes(gzip.compress("\n".join(lines[20:60]).encode()))
    files[4].write_text("")
    files[5].write_text(json.dumps({"text": "long " * 3000}) + "\n" + json.dumps({"text": "last"}))
    return files


def write_serial(files: list[Path], prefix: Path, *, tokenizer: str | Path = "byte", **options) -> dict[str, bytes]:
    """Tokenize in one process; return the content of the three files."""
    preprocess(Corpus(files, **options), prefix, tokenizer, framing=FRAMING)
    return contents(prefix)


def contents(prefix: Path) -> dict[str, bytes]:
    """Return the content of the three files of a prefix."""
    return {ending: Path(f"{prefix}{ending}").read_bytes() for ending in ENDINGS}


def end_by_kill(*arguments: object) -> None:
    """Take the place of the function that a worker runs: end the worker."""
    del arguments
    os.kill(os.getpid(), signal.SIGKILL)
