"""YAML that wants more than a run description needs: refused in one short sentence, soon, and in little memory."""

from __future__ import annotations

import re
import resource
import time
from pathlib import Path

import pytest

from megadiff.config.load import load_config
from megadiff.config.nodes import MAX_CHARACTERS, Place, parse_yaml
from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig
from tests.security.children import in_child

SPARE_BYTES = 2**29
LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))])
QUADRATIC = "a: &a [" + "x, " * 1000 + "x]\nb: [" + "*a, " * 100_000 + "*a]"
BOMBS = {
    "billion laughs": (LAUGHS, r"run:\d+: more than 50000 values once aliases are written out"),
    "in mappings": (LAUGHS.replace("[", "{k: ").replace(", ", ", l: ").replace("]", "}"), r"run:\d+: more than 50000"),
    "many uses of one list": (QUADRATIC, r"run:2: more than 50000 values once aliases are written out"),
    "an alias within itself": ("a: &a [*a]", r"run:1: the alias `\*a` names no anchor defined above it"),
    "a merge": ("a: &a {k: 1}\nb: {<<: *a}", r"merge keys \(`<<`\) are not supported"),
    "deep": ("[" * 500_000, r"run:1: values are nested deeper than 40 levels"),
    "deep mappings": ("{a: " * 200_000, r"run:1: values are nested deeper than 40 levels"),
    "too long": ("a" * (MAX_CHARACTERS + 1), r"run: 1000001 characters where at most 1000000 are wanted, .*; give the"),
    "a tag as long as a file": ("!" + "x" * 900_000 + " 1", r"run:1: the tag `!x{79}\.\.\.` is not allowed"),
    "a key as long as a file": (
        "? " + "x" * 400_000 + "\n: 1\n? " + "x" * 400_000 + "\n: 2",
        r"the key `x{80}\.\.\.` is",
    ),
}
TAGS = (
    *("!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!!python/module:os", "!!python/tuple [1]"),
    *(
        "!!python/object/new:subprocess.Popen [[ls]]",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2020-01-01",
        "!custom 1",
    ),
    *("!<tag:yaml.org,2002:python/object/apply:os.system> [ls]", "!!map {a: 1}"),
)


def _refusal(text):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, resource.RLIM_INFINITY))
    started_s = time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, Place("run"))
    return str(caught.value), time.process_time() - started_s


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused(name):
    text, wanted = BOMBS[name]
    said, took_s = in_child(_refusal, text)
    assert re.search(wanted, said), said[:300]
    assert len(said) < 400
    assert len(said.splitlines()) == 1
    assert took_s < 20


@pytest.mark.parametrize("tag", TAGS)
def test_no_tag_is_allowed_anywhere(tag):
    for text in (tag, f"a: {tag}", f"a: [1, {tag}]", f"{{a: {tag} }}"):
        with pytest.raises(ConfigError, match=r"run:1: the tag `!.*` is not allowed; write a plain value"):
            parse_yaml(text, Place("run"))


def test_a_directive_cannot_rename_a_tag_into_a_harmless_one():
    with pytest.raises(ConfigError, match=r"run:3: the tag `!!python/name:os\.system` is not allowed"):
        parse_yaml("%TAG !e! tag:yaml.org,2002:python/\n---\na: !e!name:os.system x", Place("run"))


def test_a_file_that_is_far_too_large_is_not_read(tmp_path):
    """A sparse file of 100 GB, which reading would put into memory."""
    with open(tmp_path / "run.yaml", "wb") as file:
        file.truncate(100 * 2**30)
    with pytest.raises(
        ConfigError, match=r"run\.yaml: the run description has 107,374,182,400 bytes where at most 1,000,000"
    ):
        load_config(tmp_path / "run.yaml", [], RunConfig)
