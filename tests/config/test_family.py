"""A folder as a registry."""

from __future__ import annotations

import sys

import pytest

from megadiff.config import family
from megadiff.errors import ConfigError


@pytest.fixture
def noises(tmp_path, monkeypatch):
    """A family of two members, a helper, and one that needs a library nobody has."""
    folder = tmp_path / "noises_for_test"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""A family."""\n')
    (folder / "masked.py").write_text("WHO = 'masked'\n")
    (folder / "uniform.py").write_text("WHO = 'uniform'\n")
    (folder / "_shared.py").write_text("raise RuntimeError('a helper is not a member')\n")
    (folder / "rare.py").write_text("import a_library_nobody_has\n")
    (folder / "notes.txt").write_text("not a member\n")
    (tmp_path / "lone_noise_for_test.py").write_text("WHO = 'lone'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "noises_for_test"
    for name in [name for name in sys.modules if name.startswith(("noises_for_test", "lone_noise_for_test"))]:
        del sys.modules[name]


def test_members_are_the_files_and_none_is_imported(noises):
    assert family.names(noises) == ["masked", "rare", "uniform"]
    assert "noises_for_test.masked" not in sys.modules


def test_a_member_is_its_module(noises):
    assert family.member(noises, "masked").WHO == "masked"


def test_a_dotted_name_is_a_module_from_outside(noises):
    assert family.member("megadiff.data.tokenizers", "noises_for_test.uniform").WHO == "uniform"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "maskd",
            "unknown name `maskd` in noises_for_test; did you mean `masked`? "
            "names in noises_for_test: masked, rare, uniform",
        ),
        ("zzz", "unknown name `zzz` in noises_for_test; names in noises_for_test: masked, rare, uniform"),
        ("_shared", "unknown name `_shared` in noises_for_test; names in noises_for_test: masked, rare, uniform"),
        ("rare", "`rare` in noises_for_test needs `a_library_nobody_has`, which is not installed"),
        (
            "no_such_pkg.x",
            "the module `no_such_pkg.x` cannot be found: no package `no_such_pkg` is installed or on PYTHONPATH",
        ),
        (
            "noises_for_test.gone",
            "the module `noises_for_test.gone` cannot be found: no module `noises_for_test.gone`",
        ),
        (
            "../evil.x",
            "`../evil.x` is neither a name in noises_for_test nor a dotted module such as my_pkg.my_part",
        ),
        (".x", "`.x` is neither a name in noises_for_test nor a dotted module such as my_pkg.my_part"),
    ],
)
def test_a_name_nothing_answers_to_is_one_sentence(noises, name, sentence):
    with pytest.raises(ConfigError) as caught:
        family.member(noises, name)
    assert str(caught.value) == sentence


def test_a_family_that_is_no_package_is_our_own_mistake():
    with pytest.raises(ValueError, match=r"^json\.decoder is not a package"):
        family.names("json.decoder")
