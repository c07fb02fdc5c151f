"""The fenced blocks of README.md and docs/, and the marks that state how each one is tested.

A mark is an HTML comment on the line before the fence; a reader of the rendered page does not see it.

    <!-- run -->                                   the block is run exactly as it is shown
    <!-- run; cut: NAME ARG...; cut: ... -->       the same, with arguments appended to every call of the script NAME
                                                   or of `megadiff NAME`
    <!-- exit code 2 -->                           the block is run and must end with this exit code
    <!-- tested by tests/FILE.py::NAME -->         another test runs what the block shows
    <!-- file: NAME -->                            the block is the text of a file that later blocks use
    <!-- not run: REASON -->                       one of REASONS

A page may open with `<!-- starts with: corpus -->` or `<!-- starts with: a trained run -->`; see `test_pages.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
REASONS = ("needs a GPU", "needs a cluster", "needs the network", "installs packages", "takes minutes", "an outline")
"""Reasons for which a block may be shown and not run."""

_FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- ((?:(?!-->).)*) -->\n\Z", re.DOTALL)
_START = re.compile(r"^<!-- starts with: (.*?) -->\n")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    """Path of the page in the repository."""
    line: int
    """Line of the opening fence, counted from 1."""
    language: str
    """Word behind the fence; empty for output and outlines."""
    text: str
    mark: str
    """Text of the comment before the fence; empty without one."""

    @property
    def place(self) -> str:
        """Page and line, as an editor opens them."""
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether the block is run by the test of pages."""
        return self.mark == "run" or self.mark.startswith(("run; ", "exit code "))

    @property
    def exit_code(self) -> int:
        """Exit code that the block must end with."""
        return int(self.mark.removeprefix("exit code ")) if self.mark.startswith("exit code ") else 0

    @property
    def cuts(self) -> dict[str, list[str]]:
        """Arguments to append, by the name of the script or of the command of `megadiff`."""
        found = {}
        for part in self.mark.split("; ")[1:]:
            name, *arguments = part.removeprefix("cut: ").split()
            found[name] = arguments
        return found

    @property
    def file(self) -> str | None:
        """Name of the file whose text the block is; None if it is none."""
        return self.mark.removeprefix("file: ") if self.mark.startswith("file: ") else None

    @property
    def test(self) -> str | None:
        """`FILE::NAME` of the other test that runs the block; None if there is none."""
        return self.mark.removeprefix("tested by ") if self.mark.startswith("tested by ") else None

    @property
    def reason(self) -> str | None:
        """Reason for which the block is not run; None if it is run."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else None


def pages() -> list[Path]:
    """Return README.md, CONTRIBUTING.md and every page of docs/."""
    return [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        mark = _MARK.search(before)
        found.append(
            Block(name_of(page), before.count("\n") + 1, fence[1], fence[2], " ".join(mark[1].split()) if mark else "")
        )
    return found


def start_of(page: Path) -> str:
    """Return what a page's commands start with; empty if it does not matter."""
    found = _START.match(page.read_text(encoding="utf-8"))
    return found[1] if found else ""


def prose(page: Path) -> str:
    """Return a page's text without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
