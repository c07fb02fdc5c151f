"""A hostile file in any place the project reads from runs nothing and is refused in one sentence."""

from __future__ import annotations

import re

import pytest

from megadiff.errors import MegadiffError
from tests.security.children import in_child
from tests.security.places import PLACES, emptied


def _read(place, path):
    """The refusal, or None."""
    try:
        place.real(path)
    except MegadiffError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", PLACES)
def test_a_canary_does_not_fire(tmp_path, name):
    place, canary = PLACES[name], tmp_path / "canary"
    path = place.put(emptied(tmp_path / "hostile"), f"touch {canary}")
    if place.naive is not None:
        in_child(place.naive, path)
        assert canary.exists(), "the control: this file does run code where a reader lets it"
        canary.unlink()

    said = in_child(_read, place, path)

    assert not canary.exists()
    if place.message is None:
        assert said is None
    else:
        assert said is not None
        assert re.search(place.message, said), said
        assert len(said.splitlines()) == 1
