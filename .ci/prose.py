"""Check the project's prose: plain English in docstrings, comments and pages.

    python .ci/prose.py [PATH ...]

Docstrings of functions start with a verb in the imperative, those of attributes, classes and modules with their own
subject. Words that are archaic, private to one author, or make a person of a machine are kept out of all prose.
Prints one line a finding and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = ("megadiff", "tools", "slurm", "pretrain_dlm.py", ".ci")
PAGES = ("README.md", "CONTRIBUTING.md", "docs", "examples", "slurm")

OPENINGS = frozenset(
    "Of What Where As By How Those Which Who Whose Why When From With For On In At So Into Its".split()
)
"""Words that open a fragment, whose subject the reader has to find elsewhere."""

WORDS = {
    r"mend(s|ed|ing)?": "fix",
    r"anew": "again",
    r"so many": "a number of",
    r"for ever": "forever",
    r"in vain": "without success",
    r"dear to": "expensive to",
    r"said aloud": "logged",
    r"stands for": "means",
    r"stood (for|still)": "paused",
    r"heed(s|ed)?": "read, or follow",
    r"hark\w*": "nothing",
    r"lest": "so that ... not",
    r"wherewith|whereof|whither|thereof|therein|hitherto": "a plain word",
    r"told": "given, or informed",
    r"asks? (for|the|it)": "needs, or requests",
    r"want of (memory|space|room)": "out of memory, or lack of space",
}
"""Expressions kept out of prose, each with what to write instead."""

VERBS = frozenset(
    """
    Accumulate Add Adjust Agree Align Allocate Allow Append Apply Arrange Assemble Assign Attach Attend Average Balance
    Begin Bind Bin Block Broadcast Build Bring Cache Calculate Call Cancel Cast Change Check Choose Clamp Clean Clear
    Clip Close Collect Combine Compare Compile Complete Compress Compute Condition Configure Connect Consume Continue
    Convert Copy Correct Count Cover Create Cut Deal Decide Decode Decompress Define Delay Delete Denoise Derive
    Describe Detach Detect Determine Disable Discard Distribute Divide Do Download Draw Drop Dump Embed Emit Enable
    Encode End Enforce Enter Escape Estimate Evaluate Exclude Execute Exit Expand Expect Explain Export Extend Extract
    Fail Fill Filter Find Finish Fit Flatten Flush Follow Forget Fork Format Forward Free Freeze Gather Generate Get
    Give Group Guard Handle Hash Hide Hold Ignore Import Include Increase Index Infer Initialise Insert Install
    Interleave Interpolate Invert Issue Iterate Join Keep Kill Label Launch Lay Leave Limit List Listen Load Lock Log
    Look Lower Make Map Mark Mask Match Mean Measure Merge Mix Move Multiply Name Narrow Noise Normalise Note Notice
    Number Offer Open Order Pack Pad Parse Partition Pass Pause Permute Pick Place Plan Plot Point Poll Prepare Prepend
    Preprocess Print Probe Process Produce Propose Prune Publish Push Put Raise Read Rebuild Recompute Record Reduce
    Refer Refuse Register Release Reload Remember Remove Rename Render Reorder Repeat Replace Replay Report Request
    Require Reserve Reset Reshape Resize Resolve Restart Restore Restrict Resume Return Rewrite Root Rotate Round Run
    Sample Save Scale Scan Scatter Search See Select Send Separate Serialise Set Share Shift Shorten Show Shuffle
    Shut Silence Simulate Sit Skip Sleep Smooth Solve Sort Split Spread Stack Stage Start Stop Store Stream Strip
    Subtract Suggest Sum Summarise Suppress Switch Synchronise Take Test Time Tokenize Trace Train Transform Translate
    Transpose Trim Truncate Try Turn Undo Unite Unpack Update Use Validate Verify Visit Wait Walk Warn Watch Widen Wire
    Wrap Write Yield Zero
    """.split()
)
"""Verbs that open the docstring of a function; a new one is added here."""

_FORMULA = re.compile(r"^[^A-Z]|^[\w|\\^()\[\],{} ~/]+ (=|<-) ")
_FENCE = re.compile(r"^(```|~~~)")
_QUOTED = re.compile(r"``[^`]*``|`[^`]*`|\"[^\"]*\"")


def findings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, sentence) of every fault in one file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _openings(ast.parse(text))
        yield from _words(_prose_of(text))
    else:
        yield from _words(_page(text))


def _openings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node, text in _docstrings(tree):
        first = re.split(r"[\s.,:;(]", text.strip(), maxsplit=1)[0]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_property(node):
            if first not in VERBS and not _FORMULA.match(text.strip().splitlines()[0]):
                yield node.lineno, f"{node.name}: the docstring starts with {first!r}; start with a verb, as in Return"
        elif first in OPENINGS:
            yield node.lineno, f"a docstring starts with {first!r}: give it a subject of its own"
        elif first == "Whether" and not _is_boolean(node):
            yield node.lineno, "a docstring starts with 'Whether', which is for booleans alone"


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Yield every docstring with its owner, strings below attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield (ast.Pass(lineno=1) if isinstance(node, ast.Module) else node), text
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef) and isinstance(body, list):
            for owner, below in itertools.pairwise(body):
                if isinstance(owner, ast.Assign | ast.AnnAssign) and _is_string(below):
                    yield owner, below.value.value


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def _is_boolean(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.returns is not None and "bool" in ast.unparse(node.returns)
    if isinstance(node, ast.AnnAssign):
        return "bool" in ast.unparse(node.annotation)
    return False


def _prose_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the docstrings and comments of a module."""
    before = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
        opens_statement = before in (None, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
        if token.type == tokenize.STRING and opens_statement:
            for number, line in enumerate(token.string.splitlines()):
                yield token.start[0] + number, line
        if token.type != tokenize.COMMENT:
            before = token.type


def _page(text: str) -> Iterator[tuple[int, str]]:
    is_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if _FENCE.match(line.strip()):
            is_code = not is_code
        elif not is_code:
            yield number, line


def _words(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    patterns = [(re.compile(rf"\b({word})\b", re.IGNORECASE), better) for word, better in WORDS.items()]
    for number, line in lines:
        for pattern, better in patterns:
            if found := pattern.search(_QUOTED.sub("", line.replace('"""', " "))):
                yield number, f"{found[0]!r}: write {better}"


def files(names: list[str]) -> Iterator[Path]:
    """Yield the files to check: those named, or all of the project's."""
    for name in names or [*CODE, *PAGES]:
        path = ROOT / name
        suffixes = (".py",) if name in CODE and name not in PAGES else (".md", ".py")
        for found in [path] if path.is_file() else sorted(path.rglob("*")):
            if found.suffix in suffixes and "site" not in found.relative_to(ROOT).parts[:1]:
                yield found


def main() -> int:
    """Print all findings and return the exit code."""
    count = 0
    for path in dict.fromkeys(files(sys.argv[1:])):
        for line, message in findings(path):
            print(f"{path.relative_to(ROOT)}:{line}: {message}")
            count += 1
    if count:
        print(f"{count} findings")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
