"""Write a small corpus of real English from the local Python installation, without any download.

    python tools/demo_corpus.py --output data/demo [--packages]

Its sources are Python's documentation topics (`pydoc_data.topics`), the docstrings and long comments of the standard
library (its .py files are parsed, never imported), its text files and its licence. With --packages the installed
packages are read in the same way, which gives some ten times more text and depends on what is installed. It writes
train.jsonl (about 95 %), valid.jsonl and LICENSE.txt. The split depends only on a hash of each text, so a text is
always in the same part.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from megadiff.config.command_line import CommandParser
from megadiff.errors import DataError, run_command

MIN_CHARS = 80
VALID_SHARE = 0.05
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
NO_WORDS = re.compile(r"[^A-Za-z\s\x1c-\x1f]+", re.ASCII)
"""All but the letters and the white space of ASCII."""
LICENCE_NOTE = """\
The texts in train.jsonl and valid.jsonl are taken from the Python {version} installation at {library}:
documentation topics (pydoc_data/topics.py), docstrings, comments and text files of the standard library.
Copyright Python Software Foundation and contributors, under the PSF License Agreement, version 2, and for the
documentation's examples the Zero-Clause BSD licence. Markup was removed; the "source" of each line names its file.
See https://docs.python.org/3/license.html. The installation's own licence text follows.

"""
PACKAGES_NOTE = """\
Texts whose "source" begins with packages/ are docstrings, comments and text files of the packages installed at
{packages}, each under the licence of its package.

"""


def clean(text: str) -> str:
    """Remove reST's marks and rulers, tabs and trailing blanks; keep at most one consecutive empty line."""
    text = re.sub(r":[a-z:]+:`~?([^`<]+?)(?: <[^`>]*>)?`", r"\1", text.expandtabs(4))  # :class:`dict` -> dict
    text = re.sub(r"\*\*([^*\n]+)\*\*", r"\1", text).replace("``", "`")
    text = re.sub(r"(?m)^[ \t]*([=*~^#\-_+.])\1{2,}[ \t]*$\n?|[ \t]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def topics() -> Iterator[tuple[str, str]]:
    """Yield Python's documentation topics as (source, text)."""
    from pydoc_data.topics import topics as by_name

    for name, text in sorted(by_name.items()):
        yield f"topics/{name}", text


def library_texts(library: Path) -> Iterator[tuple[str, str]]:
    """Yield docstrings, comment blocks and text files of the standard library as (source, text), ordered by path."""
    for folder, inner, files in os.walk(library):
        inner[:] = sorted(set(inner) - SKIPPED_FOLDERS)
        for path in (Path(folder, file) for file in sorted(files)):
            if path.suffix not in (".py", ".txt"):
                continue
            try:
                text = path.read_text(encoding="utf-8")
                found = prose(text) if path.suffix == ".py" else [text]
            except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
                continue  # the library's own tests contain files that are broken on purpose
            source = path.relative_to(library).as_posix()
            yield from ((source, part) for part in found)


def prose(code: str) -> list[str]:
    """Return a module's docstrings, then its comment blocks of three lines or more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        tree = ast.parse(code)
    found: list[str] = []
    ahead: list[ast.AST] = [tree]
    while ahead:  # only statements: ast.walk would spend most of its time in expressions, without a docstring
        node = ahead.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
        for part in ("finalbody", "orelse", "handlers", "body"):
            ahead += getattr(node, part, [])[::-1]
    for block in re.findall(r"(?m)(?:^[ \t]*#.*\n){3,}", code):
        found.append(re.sub(r"(?m)^[ \t]*#+ ?", "", block))
    return found


def is_english(text: str) -> bool:
    """Return whether a text is long enough and consists mostly of words.

    This excludes tables, data, commented-out code and other alphabets.
    """
    return len(text) >= MIN_CHARS and len(NO_WORDS.sub("", text)) >= 0.75 * len(text)


def is_valid(text: str) -> bool:
    """Return whether the text is held out, which depends only on its own hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < VALID_SHARE * 2**64


def texts(library: Path, packages: Path | None) -> Iterator[tuple[str, str]]:
    """Yield the topics, and the texts of a library's folder and of installed packages, as (source, text)."""
    yield from topics()
    yield from library_texts(library)
    if packages is not None:
        yield from ((f"packages/{source}", text) for source, text in library_texts(packages))


def write_corpus(output: Path, library: Path, packages: Path | None = None) -> dict[str, tuple[int, int]]:
    """Write the three files from all `texts`; return documents and characters by split."""
    seen: set[str] = set()
    counts = {"train": (0, 0), "valid": (0, 0)}
    parts = {split: output / f"{split}.jsonl.part" for split in counts}
    with parts["train"].open("w", encoding="utf-8") as train, parts["valid"].open("w", encoding="utf-8") as valid:
        for source, raw in texts(library, packages):
            text = clean(raw)
            if text in seen or not is_english(text):
                continue
            seen.add(text)
            split = "valid" if is_valid(text) else "train"
            print(json.dumps({"text": text, "source": source}), file=valid if split == "valid" else train)
            counts[split] = (counts[split][0] + 1, counts[split][1] + len(text))
    licence = library / "LICENSE.txt"
    own = licence.read_text(encoding="utf-8") if licence.exists() else "(this installation carries no LICENSE.txt)\n"
    note = LICENCE_NOTE.format(version=sys.version.split()[0], library=library)
    note += "" if packages is None else PACKAGES_NOTE.format(packages=packages)
    (output / "LICENSE.txt").write_text(note + own, encoding="utf-8")
    for split, part in parts.items():
        part.replace(output / f"{split}.jsonl")
    return counts


def main() -> None:
    """Parse the command line and write the corpus."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="output folder, created if missing")
    parser.add_argument("--part", default="", metavar="FOLDER", help="read this folder of the library alone: asyncio")
    parser.add_argument("--packages", action="store_true", help="read the installed packages too (some minutes)")
    arguments = parser.parse_args()
    output, library = arguments.output, Path(sysconfig.get_path("stdlib"), arguments.part)
    packages = Path(sysconfig.get_path("purelib")) if arguments.packages else None
    print(f"reading the documentation in {library} (some seconds)", flush=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        counts = write_corpus(output, library, packages)
    except OSError as error:
        raise DataError(f"{error.filename or output}: cannot be written or read: {error.strerror}") from None
    for split, (documents, characters) in counts.items():
        print(f"{output / split}.jsonl: {documents:,} documents, {characters:,} characters")
    print(f"{output / 'LICENSE.txt'}: texts of Python {sys.version.split()[0]}, PSF License Agreement version 2")


if __name__ == "__main__":
    run_command(main)
