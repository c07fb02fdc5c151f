"""The range of megatron-core's versions: refused outside, and the requirement that pip reads is the same."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from packaging.requirements import Requirement

from megadiff.errors import PlatformError
from megadiff.platform import megatron_versions, transformer_engine
from tests.support.commands import REPOSITORY


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0", "1.0.0"])
def test_other_versions_of_megatron_are_refused(version: str) -> None:
    with (
        patch("megatron.core.__version__", version),
        pytest.raises(
            PlatformError, match=rf"megatron-core {version} is installed, but .* checked against 0\.16 to 0\.19 only"
        ),
    ):
        megatron_versions.check()


def test_a_missing_megatron_is_named_with_its_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(
        PlatformError, match=r"megatron-core is not importable .* install `megatron-core>=0\.16,<0\.20`"
    ):
        megatron_versions.check()


def test_setup_and_the_check_name_the_same_range() -> None:
    assert f'"{megatron_versions.REQUIREMENT}"' in Path(REPOSITORY, "setup.py").read_text()
    wanted = Requirement(megatron_versions.REQUIREMENT).specifier
    for (major, minor), is_supported in zip(megatron_versions.SUPPORTED, (True, False), strict=True):
        assert wanted.contains(f"{major}.{minor}.1") == is_supported


def test_versions_are_read_by_their_first_two_numbers() -> None:
    read = megatron_versions.major_minor
    assert [read(name) for name in ("2.12rc1", "0.16.1", "2.9.0+cu12", "0.20.dev3")] == [
        (2, 12),
        (0, 16),
        (2, 9),
        (0, 20),
    ]
    assert read("unknown") == (0, 0)


def test_the_versions_named_in_messages_are_those_that_are_supported() -> None:
    first, last = (tuple(map(int, word.split("."))) for word in transformer_engine.SUPPORTED_VERSIONS.split(" to "))
    assert (first, (last[0], last[1] + 1)) == transformer_engine.SUPPORTED
    found = [transformer_engine.is_supported(name) for name in ("2.8.1", "2.9", "2.11.0", "2.12rc1", "unknown")]
    assert found == [False, True, True, False, False]


def test_the_version_wanted_is_the_one_under_test() -> None:
    wanted = os.environ.get("MEGADIFF_CORE_VERSION")
    if wanted is None:
        pytest.skip("MEGADIFF_CORE_VERSION is not set; `make test-versions` sets it")
    from megatron import core

    assert core.__version__.split("+")[0] == wanted
