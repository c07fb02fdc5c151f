"""The name that was probably meant by one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return `; did you mean `x`?` for the nearest word, or an empty string if none is near."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else ""


def similar_path(path: str | Path, is_wanted: Callable[[Path], bool], *, ending: str = "") -> str | None:
    """Return the path in the same folder whose name is nearest to that of a path which does not exist, if any is near.

    Args:
        path: what was given, without `ending`.
        is_wanted: whether a path could have been meant, such as `Path.is_dir` where a folder is wanted.
        ending: how the names that count end; it is left out of the answer.
    """
    folder = Path(path).parent
    try:
        names = sorted(found.name.removesuffix(ending) for found in folder.glob(f"*{ending}") if is_wanted(found))
    except OSError:
        return None
    by_stem = {Path(name).stem: name for name in reversed(names)}  # endings alone make no two names alike
    near = difflib.get_close_matches(Path(path).stem, by_stem, n=1, cutoff=0.6)
    return str(folder / by_stem[near[0]]) if near else None
