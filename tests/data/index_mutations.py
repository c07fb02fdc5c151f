"""Seeded damage to indexed data: bits, bytes, cuts, extreme fields, swaps, splices; and what the readers make of it."""

from __future__ import annotations

import resource
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megadiff.data.indexed_format import HEADER
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.scan import scan
from megadiff.errors import DataError

EXTREMES = (
    *(0, 1, 2, 3, 4, 5, 8, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**62, 2**63 - 1),
    *(2**63, 2**64 - 1, 2**64 - 2, 2**64 - 2**31),
)
FIELDS = {"version": (9, 8), "dtype": (17, 1), "sequences": (18, 8), "boundaries": (26, 8)}
SPARE_BYTES = 2**28
"""Address space that opening and reading a damaged file of a few hundred bytes may take beyond what there was."""

Content = dict[str, bytes]
"""By suffix: `.idx`, `.bin`, `.json`."""


@dataclass(frozen=True)
class Truth:
    """Undamaged data."""

    content: Content
    tokens: bytes
    documents: list[bytes]


def truth_of(prefix: Path) -> Truth:
    """What is on disk, and what an undamaged reader gives."""
    reader = IndexedReader(prefix)
    content = {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in (".idx", ".bin", ".json")}
    return Truth(content, *_sequences(reader))


def bit_flip(raw: bytearray, draw: np.random.Generator, other: bytes) -> None:
    """One to three bits."""
    for _ in range(draw.integers(1, 4)):
        raw[draw.integers(len(raw))] ^= 1 << int(draw.integers(8))


def byte_set(raw: bytearray, draw: np.random.Generator, other: bytes) -> None:
    """One to four bytes."""
    for _ in range(draw.integers(1, 5)):
        raw[draw.integers(len(raw))] = draw.integers(256)


def cut(raw: bytearray, draw: np.random.Generator, other: bytes) -> None:
    """The end is gone."""
    del raw[draw.integers(len(raw)) :]


def longer(raw: bytearray, draw: np.random.Generator, other: bytes) -> None:
    """Something follows."""
    raw.extend(draw.bytes(int(draw.integers(1, 40))))


def extreme_field(raw: bytearray, draw: np.random.Generator, other: bytes) -> None:
    """A header field, or an aligned number of the rest, is set to something far out."""
    value = EXTREMES[draw.integers(len(EXTREMES))]
    if draw.random() < 0.5:
        offset, size = list(FIELDS.values())[draw.integers(len(FIELDS))]
    else:
        size = int(draw.choice([2, 4, 8]))
        offset = HEADER.size + size * int(draw.integers(max(1, (len(raw) - HEADER.size) // size)))
    raw[offset : offset + size] = struct.pack("<Q", value)[:size][: max(0, len(raw) - offset)]


def near_field(raw: bytearray, draw: np.random.Generator, other: bytes) -> None:
    """An aligned number becomes a little more or less: what is most like the truth."""
    size = int(draw.choice([4, 8]))
    offset = HEADER.size + 4 * int(draw.integers(max(1, (len(raw) - HEADER.size) // 4)))
    number = int.from_bytes(raw[offset : offset + size], "little") + int(draw.choice([-2, -1, 1, 2]))
    raw[offset : offset + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")[: max(0, len(raw) - offset)]


def swap(raw: bytearray, draw: np.random.Generator, other: bytes) -> None:
    """Two stretches of one length change places."""
    size = int(draw.integers(1, min(17, max(2, len(raw) // 2))))
    one, two = sorted(int(place) for place in draw.integers(0, len(raw) - size + 1, size=2))
    if two - one >= size:
        raw[one : one + size], raw[two : two + size] = raw[two : two + size], raw[one : one + size]


def splice(raw: bytearray, draw: np.random.Generator, other: bytes) -> None:
    """From some byte on, or for a stretch, it is another file's."""
    start = int(draw.integers(len(raw)))
    stop = len(other) if draw.random() < 0.5 else start + int(draw.integers(1, 65))
    raw[start:stop] = other[start:stop]


def lost_or_twice(raw: bytearray, draw: np.random.Generator, other: bytes) -> None:
    """A stretch is missing, doubled, or zero."""
    start, size = int(draw.integers(len(raw))), int(draw.integers(1, 33))
    part = bytes(raw[start : start + size])
    raw[start : start + size] = (b"", part * 2, bytes(len(part)))[draw.integers(3)]


MUTATIONS: tuple[Callable[[bytearray, np.random.Generator, bytes], None], ...] = (
    *(bit_flip, byte_set, cut, longer, extreme_field, near_field, swap, splice, lost_or_twice),
)
TARGETS = ((".idx",), (".bin",), (".idx", ".bin"), (".json",), (".idx", "no manifest"))


def mutated(truth: Truth, other: Truth, draw: np.random.Generator) -> tuple[Content, str, bool]:
    """Damaged content, what was done in words, and whether anything differs."""
    target = TARGETS[draw.integers(len(TARGETS))]
    content = dict(truth.content)
    done = []
    for suffix in target:
        if suffix == "no manifest":
            del content[".json"]
            continue
        raw = bytearray(content[suffix])
        mutate = MUTATIONS[draw.integers(len(MUTATIONS))]
        mutate(raw, draw, other.content[suffix])
        content[suffix] = bytes(raw)
        done.append(f"{mutate.__name__} of {suffix}")
    is_changed = any(content.get(suffix) != truth.content[suffix] for suffix in (".idx", ".bin", ".json"))
    return content, f"{' and '.join(done)}, {'with' if '.json' in content else 'without'} manifest", is_changed


def outcome(prefix: Path, truth: Truth) -> str:
    """`refused`, `same` (every token and document), `found` by the scan, or what is wrong, in words."""
    try:
        reader = IndexedReader(prefix)
        tokens, documents = _sequences(reader)
    except DataError as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"WRONG: not one sentence: {error}"
    except BaseException as error:  # a MemoryError as well
        return f"WRONG: {type(error).__name__}: {error}"
    if (tokens, documents) == (truth.tokens, truth.documents):
        return "same"
    seen = scan(prefix)
    if tokens == truth.tokens and seen.hashes == "none" and seen.empty_documents:
        return "found"  # where Megatron's documents begin cannot be known better
    return "found" if seen.errors else "WRONG: other tokens or documents, and nothing says so"


def outcomes(truths: list[Path], folder: Path, *, count: int, seed: int) -> Counter[str]:
    """How often each outcome was met; to be called in a child, whose memory it bounds."""
    known = [truth_of(prefix) for prefix in truths]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
    draw = np.random.default_rng(seed)
    met: Counter[str] = Counter()
    prefix = folder / "damaged"
    on_disk: Content = {}
    while met.total() < count:
        one, two = draw.permutation(len(known))[:2]
        content, what, is_changed = mutated(known[one], known[two], draw)
        if not is_changed:
            continue
        _put(prefix, content, on_disk)
        said = outcome(prefix, known[one])
        met[f"{said} ({what} of {truths[one].name})" if said.startswith("WRONG") else said] += 1
    return met


def _put(prefix: Path, content: Content, on_disk: Content) -> None:
    """Write what differs from what the last call left there."""
    for suffix in (".idx", ".bin", ".json"):
        path = Path(f"{prefix}{suffix}")
        if suffix not in content:
            path.unlink(missing_ok=True)
        elif on_disk.get(suffix) != content[suffix]:
            path.write_bytes(content[suffix])
    on_disk.clear()
    on_disk.update(content)


def _sequences(reader: IndexedReader) -> tuple[bytes, list[bytes]]:
    tokens = reader.tokens(0, reader.num_tokens).tobytes()
    return tokens, [reader.document(number).tobytes() for number in range(reader.num_documents)]
