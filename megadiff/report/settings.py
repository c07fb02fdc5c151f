"""Settings of a run as flat `section.key` pairs, and the differences between runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megadiff.untrusted_files import read_bytes

_MAX_BYTES, _MAX_KEYS, _MAX_DEPTH, _MAX_CHARACTERS = 2**20, 5000, 12, 2000
_LABELS = ("name", "output_dir")
"""Keys that identify the run and do not describe how it was made."""


def read_settings(path: Path) -> dict[str, str] | None:
    """Return the resolved tree of `config.yaml`, flattened; None if it is missing or not such a tree."""
    try:
        tree = yaml.safe_load(read_bytes(path, max_bytes=_MAX_BYTES).decode("utf-8", "replace"))
        return dict(itertools.islice(_flat(tree, "", 0), _MAX_KEYS)) if isinstance(tree, dict) else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None


def differences(runs: Sequence[Mapping[str, str] | None]) -> dict[str, list[str | None]]:
    """Return the settings in which the runs that have any differ: by key, each run's value, None if it has none.

    `name` and `output_dir` are left out. Keys have the order of the first run that has them.
    """
    known = [run for run in runs if run is not None]
    keys = dict.fromkeys(key for run in known for key in run if key not in _LABELS)
    changed = [key for key in keys if len({run.get(key) for run in known}) > 1]
    return {key: [None if run is None else run.get(key) for run in runs] for key in changed}


def _flat(tree: Any, prefix: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > _MAX_DEPTH:
        yield prefix, "..."
    elif isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif isinstance(tree, list) and tree:
        for place, value in enumerate(tree):
            yield from _flat(value, f"{prefix}[{place}]", depth + 1)
    else:
        yield prefix, _said(tree)


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)[:_MAX_CHARACTERS]
