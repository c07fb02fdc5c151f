"""The reference of all keys: the committed page is current, and the members of families are in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from megadiff.config import reference, registry, schema
from megadiff.config.section import Section
from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig
from tests.support.forked_command import call_forked

PAGE = Path(__file__).parents[2] / "docs/configuration.md"
KEYS = list(reference.keys(RunConfig))


def test_the_page_is_current():
    """`python -m megadiff.config.reference > docs/configuration.md` writes it."""
    assert reference.markdown(RunConfig) == PAGE.read_text()


def test_every_key_is_on_the_page_and_explained():
    assert {key.name for key in KEYS if "[]" not in key.name and ": " not in key.name} == set(
        schema.dotted_keys(RunConfig)
    )
    assert {"data.train[].path", "data.train[].weight"} < {key.name for key in KEYS}
    assert [key.name for key in KEYS if not key.meaning] == []


class Process(Section):
    """Which noise."""

    process: str = "plain"
    """Name of the process."""


class Limits(Section):
    """Limits of something."""

    low: float = Field(default=0.5, gt=0, le=1)
    """Lower | limit."""
    words: tuple[str, ...] = Field(default=("a", "no"), min_length=1)
    """Some words."""


class Run(Section):
    limits: Limits = Limits(low=0.25)
    mode: Literal["on", "x"] | None = Field(alias="async")
    """Some mode."""


def test_a_sequence_has_type_default_bounds_and_meaning():
    sequences = {key.name: key for key in reference.keys(Run)}
    assert list(sequences) == ["async", "limits", "limits.low", "limits.words"]
    assert sequences["async"] == reference.Key("async", "one of on, x or null", "required", "", "Some mode.")
    assert sequences["limits.low"] == reference.Key("limits.low", "a number", "0.25", "> 0, <= 1", "Lower | limit.")
    assert sequences["limits.words"].default == '[a, "no"]'
    assert "| `limits.low` | a number | `0.25` | > 0, <= 1 | Lower \\| limit. |" in reference.markdown(Run)


@pytest.fixture
def with_family(tmp_path, monkeypatch):
    folder = tmp_path / "family_for_reference"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "plain.py").write_text("")
    (folder / "tuned.py").write_text(
        "from megadiff.config.section import Section\nclass Settings(Section):\n    '''A tuned noise.'''\n"
        "    shift: float = 0.5\n    '''How far it is shifted.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    family = registry.Family("family_for_reference", key="process")

    class WithFamily(Section):
        noise: Annotated[Process, family] = family.default(Process)

    return WithFamily


def test_members_and_their_own_keys_are_listed(with_family):
    sequences = list(reference.keys(with_family))
    assert [sequence.name for sequence in sequences] == [
        "noise",
        "noise.process",
        "noise.process: tuned",
        "noise.shift",
    ]
    assert sequences[1].takes == "text: plain, tuned, or a dotted path"
    assert sequences[2].meaning == "A tuned noise."
    assert reference.plain_text(with_family, "noise.shift").splitlines() == [
        "noise.shift: a number, default 0.5",
        "    How far it is shifted.",
    ]


def test_the_json_schema_leaves_the_keys_of_members_open(with_family):
    schema = reference.json_schema(with_family)
    assert list(schema["properties"]) == ["base", "noise"]
    assert schema["properties"]["noise"]["type"] == "object"
    assert "additionalProperties" not in schema["properties"]["noise"]


def test_the_command_prints_the_keys_that_begin_so():
    ended = call_forked("pretrain_dlm.py", "--keys", "optimizer.beta")
    assert ended.code == 0
    assert {*re.findall(r"^\S+:", ended.out, re.M)} == {"optimizer.beta1:", "optimizer.beta2:"}


def test_an_unknown_key_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"^--keys nose: .* no such key; did you mean `noise`\?$"):
        reference.plain_text(RunConfig, "nose")
