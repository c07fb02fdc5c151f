"""The kinds of YAML files in `examples/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def kind_of(tree: Any, path: Path | None = None) -> str:
    """`sweep`, `laws`, `base` for parts of run descriptions, to be named under `base:`, or `run`."""
    if path is not None and path.parent.name == "presets":
        return "base"
    return "sweep" if "budgets" in tree else "laws" if "laws" in tree else "run"


def kind_of_file(path: Path) -> str:
    """The same of a file; libyaml's parser, since some hold thousands of numbers and are read at every collection."""
    text = path.read_text(encoding="utf-8")
    tree = yaml.load(text, yaml.CSafeLoader) if yaml.__with_libyaml__ else yaml.safe_load(text)
    return kind_of(tree, path)
