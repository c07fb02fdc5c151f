"""A folder as a registry, and sections whose keys belong to a member."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError, model_validator

from megadiff.config import registry
from megadiff.config.load import dump_config, load_config
from megadiff.config.section import Section
from megadiff.errors import ConfigError

LISTED = "noises_for_test has: masked, rare, uniform; a module of your own is given by its dotted path"


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
    assert registry.names(noises) == ["masked", "rare", "uniform"]
    assert "noises_for_test.masked" not in sys.modules


def test_a_member_is_its_module(noises):
    assert registry.member(noises, "masked").WHO == "masked"


def test_a_dotted_name_is_a_module_from_outside(noises):
    assert registry.member("megadiff.data.tokenizers", "noises_for_test.uniform").WHO == "uniform"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "maskd",
            f"unknown name `maskd`; did you mean `masked`? {LISTED}",
        ),
        ("zzz", f"unknown name `zzz`; {LISTED}"),
        ("_shared", f"unknown name `_shared`; {LISTED}"),
        ("rare", "`rare` in noises_for_test needs `a_library_nobody_has`, which is not installed"),
        (
            "noises_for_test._shared",
            "the module `noises_for_test._shared` fails on import (RuntimeError: a helper is not a member); "
            "`python -c 'import noises_for_test._shared'` shows where",
        ),
        (
            "no_such_pkg.x",
            "the module `no_such_pkg.x` cannot be found: no package `no_such_pkg` is installed or on PYTHONPATH; add "
            "the folder that holds `no_such_pkg`, as in `export PYTHONPATH=FOLDER`",
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
        registry.member(noises, name)
    assert str(caught.value) == sentence


def test_a_module_in_this_folder_is_said_to_be_here(noises, tmp_path, monkeypatch):
    (tmp_path / "work/lies_here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # `python -m` adds this folder itself
    with pytest.raises(ConfigError, match=r"; `export PYTHONPATH=\.` adds this folder, which holds `lies_here`$"):
        registry.member(noises, "lies_here.x")


def test_a_family_that_is_no_package_is_our_own_mistake():
    with pytest.raises(ValueError, match=r"^json\.decoder is not a package"):
        registry.names("json.decoder")


class Noise(Section):
    process: str = "masked"
    floor: float = Field(default=-9.0, lt=0)

    @model_validator(mode="after")
    def _floor_is_lucky(self) -> Noise:
        if self.floor == -13:
            raise ValueError("a floor of -13 is unlucky")
        return self


class Hook(Section):
    name: str
    every: int = Field(default=1, gt=0)


@pytest.fixture
def run(noises, tmp_path):
    """A description with a section and a list of sections that belong to a family of two kinds of members."""
    header = "from pydantic import Field\nfrom megadiff.config.section import Section\n"
    (tmp_path / noises / "uniform.py").write_text(
        f"{header}class Settings(Section):\n    shift: float = Field(default=0.0, le=10)\n"
        "    kind: str\n    floor: float = Field(default=-5.0, lt=0)\n"
    )
    (tmp_path / noises / "wrong.py").write_text("class Settings:\n    pass\n")
    processes, hook_family = registry.Family(noises, key="process"), registry.Family(noises)

    class Run(Section):
        noise: Annotated[Noise, processes] = processes.default(Noise)
        hooks: tuple[Annotated[Hook, hook_family], ...] = ()

    return Run


def refusals(run, values):
    with pytest.raises(ValidationError) as caught:
        run.model_validate(values)
    return {".".join(map(str, error["loc"])): error["msg"] for error in caught.value.errors()}


def test_a_section_has_the_keys_of_the_member_it_names(noises, run):
    noise = run.model_validate({"noise": {"process": "uniform", "kind": "a", "shift": 2}}).noise
    assert isinstance(noise, Noise)
    assert isinstance(noise, registry.member(noises, "uniform").Settings)
    assert noise.model_dump() == {"process": "uniform", "floor": -5.0, "shift": 2.0, "kind": "a"}


def test_a_section_that_is_left_out_is_the_default_member(run):
    assert run().noise == Noise(process="masked", floor=-9.0)
    assert type(run().noise) is Noise  # a member without settings has the shared keys alone


def test_a_list_holds_members_from_inside_and_outside(run):
    found = run.model_validate({"hooks": [{"name": "masked"}, {"name": "noises_for_test.uniform", "kind": "b"}]})
    assert [type(hook).__name__ for hook in found.hooks] == ["Hook", "Hook"]
    assert found.hooks[1].model_dump() == {
        "name": "noises_for_test.uniform", "every": 1, "shift": 0.0, "kind": "b", "floor": -5.0
    }  # fmt: skip


def test_what_is_dumped_reads_back_as_itself(run):
    values = {"noise": {"process": "uniform", "kind": "a"}, "hooks": [{"name": "uniform", "kind": "b", "every": 4}]}
    found = run.model_validate(values)
    assert run.model_validate(found.model_dump(mode="json", by_alias=True)) == found
    assert "kind: b" in dump_config(found)
    assert run.model_validate(found.model_copy(update={"hooks": ()})).noise is found.noise


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"noise": {"process": "unifrm"}}, {"noise.process": "unknown name `unifrm`; did you mean `uniform`"}),
        ({"noise": {"process": 5, "shift": 1}}, {"noise.process": "Input should be a valid string"}),
        ({"noise": {"process": "rare"}}, {"noise.process": "needs `a_library_nobody_has`, which is not installed"}),
        ({"noise": {"process": "wrong"}}, {"noise.process": "`Settings` of `wrong` must be a subclass"}),
        ({"noise": {"shift": 1}}, {"noise.shift": "Extra inputs are not permitted"}),
        (
            {"noise": {"process": "uniform", "shift": 11, "floor": 0, "rank": 1}},
            {
                "noise.shift": "less than or equal to 10",
                "noise.floor": "less than 0",
                "noise.rank": "Extra inputs",
                "noise.kind": "Field required",
            },
        ),
        ({"noise": {"process": "uniform", "kind": "a", "floor": -13}}, {"noise": "a floor of -13 is unlucky"}),
        (
            {"hooks": [{"every": 2}, {"name": "uniform", "kind": "b", "every": 0}]},
            {"hooks.0.name": "Field required", "hooks.1.every": "greater than 0"},
        ),
        ({"noise": 3}, {"noise": "valid dictionary"}),
    ],
)
def test_a_mistake_is_found_where_it_is(run, values, wanted):
    found = refusals(run, values)
    assert set(found) == set(wanted)
    for place, words in wanted.items():
        assert re.search(words, found[place]), found


def test_a_members_settings_may_derive_from_the_section(noises, tmp_path, run):
    (tmp_path / "derived_for_test.py").write_text(
        "from tests.config.test_registry import Noise\nclass Settings(Noise):\n    power: int = 2\n"
    )
    try:
        processes = registry.Family(noises, key="process")
        (tmp_path / noises / "derived.py").write_text("from derived_for_test import Settings\n")
        built: Any = processes.build(Noise, process="derived", power=3)
        assert type(built) is sys.modules["derived_for_test"].Settings
        assert built.power == 3
    finally:
        sys.modules.pop("derived_for_test", None)


def test_the_members_of_a_family_that_can_be_imported_here(noises, run):
    found = dict(registry.Family(noises, key="process").sections(Noise))
    assert list(found) == ["masked", "uniform"]
    assert list(found["uniform"].model_fields) == ["process", "floor", "shift", "kind"]


def test_a_section_built_without_its_member_is_completed_or_refused(run):
    assert type(run(noise=Noise(process="masked")).noise) is Noise
    with pytest.raises(ValidationError, match=r"noise\.kind\n  Field required"):
        run(noise=Noise(process="uniform"))


def test_the_section_s_own_validators_may_give_the_name(noises, run):
    class Short(Noise):
        @model_validator(mode="before")
        @classmethod
        def _from_word_or_null(cls, data):
            if isinstance(data, str):
                return {"process": data, "floor": -2}
            return {key: value for key, value in data.items() if value is not None}

    processes = registry.Family(noises, key="process")

    class Outer(Section):
        noise: Annotated[Short, processes]

    assert Outer.model_validate({"noise": "masked"}).noise == Short(process="masked", floor=-2)
    assert refusals(Outer, {"noise": "uniform"}) == {"noise.kind": "Field required"}
    assert set(refusals(Outer, {"noise": "gone"})) == {"noise.process"}
    assert Outer.model_validate({"noise": {"process": None, "floor": -3}}).noise == Short(floor=-3)
    assert set(refusals(Outer, {"noise": {"process": None, "shift": 1}})) == {"noise.shift"}


DESCRIPTION = """\
noise:
  process: uniform
  kind: 1e5
hooks:
- name: noises_for_test.uniform
  kind: no
  shift: 1
- name: masked
"""


@pytest.fixture
def load(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def loads(text, *overrides):
        (tmp_path / "a.yaml").write_text(text)
        return load_config("a.yaml", overrides, run)

    return loads


def test_members_are_read_from_yaml_and_written_back(load):
    config = load(DESCRIPTION, "noise.shift=1e0", "hooks.1.every=1e1")
    assert config.noise.model_dump() == {"process": "uniform", "floor": -5.0, "shift": 1.0, "kind": "1e5"}
    assert config.hooks[0].model_dump() == {
        "name": "noises_for_test.uniform", "every": 1, "shift": 1.0, "kind": "no", "floor": -5.0
    }  # fmt: skip
    assert config.hooks[1].model_dump() == {"name": "masked", "every": 10}
    assert load(dump_config(config)) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("noise.shift=much", "command line: `noise.shift` wants a number, found `much`"),
        ("noise.shift=11", "command line: `noise.shift` must be less than or equal to 10, found `11`"),
        ("noise.shift='1'", "command line: `noise.shift` wants a number, found the quoted text '1'"),
        ("noise.floor=true", "command line: `noise.floor` wants a number, found `true`"),
        ("noise.kind=", "command line: `noise.kind` wants text, found nothing (null)"),
        (
            "noise.shfit=1",
            "command line: unknown key `noise.shfit`; did you mean `noise.shift`? "
            "keys here: process, floor, shift, kind",
        ),
        (
            "noise.floor=-13",
            "a.yaml:1 (with floor from the command line): `noise`: a floor of -13 is unlucky",
        ),
        (
            "hooks.1.shift=2",
            "command line: unknown key `hooks.1.shift`, a key of uniform, while `hooks.1.name` is masked "
            "(a.yaml:8); keys here: name, every",
        ),
        ("hooks.0.every=0", "command line: `hooks.0.every` must be greater than 0, found `0`"),
        ("hooks.2.every=1", "command line: missing required key `hooks.2.name`, which wants text"),
        (
            "noise.process=unifrm",
            "command line: `noise.process`: unknown name `unifrm`; did you mean `uniform`? "
            + LISTED.replace("uniform", "uniform, wrong"),
        ),
        (
            "hooks.0.name=no_such_pkg.x",
            "command line: `hooks.0.name`: the module `no_such_pkg.x` cannot be found: no package `no_such_pkg` is "
            "installed or on PYTHONPATH; add the folder that holds `no_such_pkg`, as in `export PYTHONPATH=FOLDER`",
        ),
        ("noise=3", "command line: `noise` wants a mapping of keys, found `3`"),
    ],
)
def test_a_mistake_in_a_members_keys_has_its_place(load, override, sentence):
    with pytest.raises(ConfigError) as caught:
        load(DESCRIPTION, override)
    assert str(caught.value) == sentence


KEYS = "keys here: process, floor"


@pytest.mark.parametrize(
    ("base", "own", "overrides", "sentence"),
    [
        (
            "process: uniform, kind: a",
            "process: masked",
            [],
            "b.yaml:1: unknown key `noise.kind`, a key of uniform, while `noise.process` is masked (a.yaml:2); take it "
            f"back with `kind: null` under `noise` in a.yaml; {KEYS}",
        ),
        (
            "process: noises_for_test.warm, warmth: 3",
            "process: masked",
            [],
            "b.yaml:1: unknown key `noise.warmth`, while `noise.process` is masked (a.yaml:2); take it back with "
            f"`warmth: null` under `noise` in a.yaml; {KEYS}",
        ),
        (
            "floor: -2",
            "process: uniform, kind: a",
            ["noise.process=masked"],
            "a.yaml:2: unknown key `noise.kind`, a key of uniform, while `noise.process` is masked (command line); "
            f"take it back with noise.kind=null; {KEYS}",
        ),
        (
            "process: masked",
            "kind: a",
            [],
            "a.yaml:2: unknown key `noise.kind`, a key of uniform, while `noise.process` is masked (b.yaml:1); " + KEYS,
        ),
        ("floor: -2", "kind: null", [], f"a.yaml:2: unknown key `noise.kind`, a key of uniform; {KEYS}"),
        ("flor: -2", "process: masked", [], f"b.yaml:1: unknown key `noise.flor`; did you mean `noise.floor`? {KEYS}"),
    ],
)
def test_a_key_of_the_base_s_member_is_named_with_its_remedy(load, tmp_path, base, own, overrides, sentence):
    (tmp_path / "b.yaml").write_text(f"noise: {{{base}}}\n")
    with pytest.raises(ConfigError) as caught:
        load(f"base: b.yaml\nnoise: {{{own}}}\n", *overrides)
    assert str(caught.value) == sentence


def test_null_takes_back_a_key_that_the_chosen_member_lacks(load, tmp_path):
    (tmp_path / "b.yaml").write_text("noise: {process: uniform, kind: a, floor: -2, shift: 3}\n")
    own = "base: b.yaml\nnoise: {process: masked, kind: null}\n"
    assert load(own, "noise.shift=null").noise == Noise(process="masked", floor=-2)
    with pytest.raises(ConfigError, match=r"^command line: unknown key `noise\.flor`; did you mean `noise\.floor`\? "):
        load(own, "noise.shift=", "noise.flor=null")


def test_a_key_left_out_of_a_member_has_the_place_of_its_section(load):
    with pytest.raises(ConfigError) as caught:
        load("noise:\n  process: uniform\n  shift: x\n")
    assert str(caught.value).splitlines() == [
        "a.yaml:1: missing required key `noise.kind`, which wants text",
        "a.yaml:3: `noise.shift` wants a number, found `x`",
    ]
