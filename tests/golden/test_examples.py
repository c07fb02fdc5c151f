"""A record of every default and of all that each example description sets, resolved as a run resolves it.

Rewrite `examples.json` only for a deliberate change: `python -m tests.golden.test_examples`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadiff.config.load import load_config
from megadiff.run.config import RunConfig
from tests.support.examples import kind_of_file

FILE = Path(__file__).with_name("examples.json")
REPOSITORY = Path(__file__).parents[2]
EXAMPLES = {
    str(path.relative_to(REPOSITORY)): path
    for path in sorted((REPOSITORY / "examples").rglob("*.yaml"))
    if kind_of_file(path) == "run"
}
LEAST: dict[str, Any] = {
    "name": "least",
    "model": {"layers": 1, "hidden": 8, "heads": 1, "seq_length": 8},
    "data": {"train": ["data"], "tokenizer": "byte"},
    "batch": {"global_batch_size": 1, "micro_batch_size": 1},
    "optimizer": {"name": "adamw", "lr": 0.001},
    "schedule": {"steps": 5000},
}


def leaves(tree: Any, key: str = "") -> dict[str, Any]:
    """Return the values of a tree under dotted keys."""
    if isinstance(tree, dict) and tree:
        return {k: v for part, below in tree.items() for k, v in leaves(below, f"{key}.{part}".strip(".")).items()}
    return {key: tree}


def resolved(config: RunConfig) -> dict[str, Any]:
    """Return the leaves of a resolved description, as they would be read back from JSON."""
    return leaves(json.loads(json.dumps(config.model_dump(mode="json", by_alias=True))))


def defaults() -> dict[str, Any]:
    """Return all settings of a run that sets only what it must."""
    return resolved(RunConfig.model_validate(LEAST))


def settings_of(path: Path) -> dict[str, Any]:
    """Return what an example sets other than the defaults, and the number of its settings."""
    found, usual = resolved(load_config(path, [], RunConfig)), defaults()
    return {"fields": len(found), **{key: value for key, value in found.items() if usual.get(key) != value}}


RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}


def test_the_defaults_are_those_recorded() -> None:
    assert defaults() == RECORDED["defaults"]


def test_every_example_is_recorded() -> None:
    assert set(EXAMPLES) == set(RECORDED["examples"])


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_resolves_as_recorded(name: str) -> None:
    assert settings_of(EXAMPLES[name]) == RECORDED["examples"][name]


if __name__ == "__main__":
    recorded = {"defaults": defaults(), "examples": {name: settings_of(path) for name, path in EXAMPLES.items()}}
    FILE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
