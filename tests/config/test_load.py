"""Loading a run description: precedence, reading by type, and the full text of every refusal."""

# ruff: noqa: E501  a table of whole sentences reads best with a sentence a line

from __future__ import annotations

import copy
import enum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator

from megadiff.config.load import MAX_BYTES, dump_config, load_config
from megadiff.config.reference import json_schema
from megadiff.config.section import Section
from megadiff.errors import ConfigError


class Model(Section):
    layers: int = Field(gt=0)
    hidden: int = Field(default=64, gt=0)
    heads: int = 8
    qk_norm: Literal["full", "head", "none"] = "head"

    @model_validator(mode="after")
    def heads_share_the_width(self) -> Model:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} must be a multiple of heads {self.heads}")
        return self


class Noise(Section):
    shift: float | Literal["masked", "uniform"] = 0.0
    scale: float = Field(default=1.0, le=1)

    @field_validator("scale")
    @classmethod
    def not_a_third(cls, value: float) -> float:
        if value == 0.3:
            raise ValueError("a scale of 0.3 is unlucky")
        return value


class Source(Section):
    path: str
    weight: float = Field(default=1.0, gt=0)


class Data(Section):
    train: list[Source] = Field(min_length=1)


class Sgd(Section):
    name: Literal["sgd"] = "sgd"
    lr: float = 0.1


class Adam(Section):
    name: Literal["adam"]
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


class Run(Section):
    name: str
    model: Model
    noise: Noise = Field(default_factory=Noise)
    data: Data
    flops: float | None = None
    steps: int = 10
    keep: bool = False
    async_: bool = Field(default=True, alias="async")
    optimizer: Sgd | Adam = Field(default_factory=Sgd)
    labels: dict[str, int] = Field(default_factory=dict)
    extra: Any = None
    cooldown: int | float = 0.2
    note: str | None = None


GOOD = """\
name: trial
model: {layers: 2}
data:
  train:
  - path: corpus
"""
RUN_KEYS = "name, model, noise, data, flops, steps, keep, async, optimizer, labels, extra, cooldown, note"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the text as a.yaml in the current folder, so that messages name it plainly."""
    monkeypatch.chdir(tmp_path)

    def loads(text: str | bytes, *overrides: str, model: type[Section] = Run) -> Any:
        Path("a.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config("a.yaml", overrides, model)

    return loads


@pytest.fixture
def refusal(load):
    def refuses(text: str | bytes, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return refuses


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("flops", "1e22", 1e22),
        ("flops", "3e-4", 3e-4),
        ("flops", "1_000", 1000.0),
        ("flops", "+.5", 0.5),
        ("flops", "3", 3.0),
        ("flops", "null", None),
        ("flops", "", None),
        ("steps", "1_000", 1000),
        ("steps", "1e6", 1_000_000),
        ("steps", "1.5e3", 1500),
        ("steps", "-4", -4),
        ("keep", "on", True),
        ("keep", "Yes", True),
        ("keep", "TRUE", True),
        ("keep", "off", False),
        ("keep", "no", False),
        ("async", "false", False),
        ("name", "no", "no"),
        ("name", "12:30", "12:30"),
        ("name", "010", "010"),
        ("name", "1e5", "1e5"),
        ("name", "2020-01-01", "2020-01-01"),
        ("name", '"null"', "null"),
        ("note", "null", None),
        ("note", "'null'", "null"),
        ("noise.shift", "masked", "masked"),
        ("noise.shift", "-1000", -1000.0),
        ("model.qk_norm", "none", "none"),
        ("cooldown", "200", 200),
        ("cooldown", "0.2", 0.2),
        ("cooldown", "1e3", 1000.0),
        ("labels", "{a: 1, b: 2e1}", {"a": 1, "b": 20}),
        ("extra", "[1, 2.5, no, ~, true, '1']", [1, 2.5, "no", None, True, "1"]),
    ],
)
def test_a_word_is_read_as_its_field_wants_it(load, key, text, value):
    from_override = load(GOOD, f"{key}={text}")
    inner = text
    for name in reversed(key.split(".")):
        inner = f"{{{name}: {inner}}}" if name != key.split(".")[0] else f"{name}: {inner}"
    kept = GOOD.split("\n", 1)[1] if key == "name" else GOOD.replace("model: {layers: 2}\n", "")
    kept = GOOD if key.split(".")[0] not in ("name", "model") else kept
    inner = inner.replace("{qk_norm", "{layers: 2, qk_norm")
    from_file = load(kept + inner)
    for config in (from_override, from_file):
        found = config
        for name in key.split("."):
            found = getattr(found, "async_" if name == "async" else name)
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("steps: 1.5", "a.yaml:6: `steps` wants an integer, found `1.5`"),
        ("steps: 1.0", "a.yaml:6: `steps` wants an integer, found `1.0`"),
        ("steps: 010", "a.yaml:6: `steps` wants an integer, found `010`"),
        ("steps: '3'", "a.yaml:6: `steps` wants an integer, found the quoted text '3'"),
        ("steps: 12:30", "a.yaml:6: `steps` wants an integer, found `12:30`"),
        ("steps:", "a.yaml:6: `steps` wants an integer, found nothing (null)"),
        ("steps: [1]", "a.yaml:6: `steps` wants an integer, found a list"),
        ("steps: 1e400", "a.yaml:6: `steps` wants an integer, found `1e400`"),
        ("steps: " + "9" * 5000, f"a.yaml:6: `steps` wants an integer, found `{'9' * 57}...`"),
        ("keep: 'yes'", "a.yaml:6: `keep` wants true or false, found the quoted text 'yes'"),
        ("keep: 1", "a.yaml:6: `keep` wants true or false, found `1`"),
        ("keep: yEs", "a.yaml:6: `keep` wants true or false, found `yEs`"),
        ("flops: fast", "a.yaml:6: `flops` wants a number or null, found `fast`"),
        ("flops: .inf", "a.yaml:6: `flops` must be a finite number, found `.inf`"),
        ("flops: 1e400", "a.yaml:6: `flops` must be a finite number, found `1e400`"),
        ("noise: 3", "a.yaml:6: `noise` wants a mapping of keys, found `3`"),
        ("noise:\n  scale: 2", "a.yaml:7: `noise.scale` must be less than or equal to 1, found `2`"),
        ("noise:\n  scale: 0.3", "a.yaml:7: `noise.scale`: a scale of 0.3 is unlucky"),
        (
            "noise:\n  shift: maskd",
            "a.yaml:7: `noise.shift` wants a number or one of masked, uniform, found `maskd`; did you mean `masked`?",
        ),
        ("optimizer: {name: adam, betas: [1]}", "a.yaml:6: `optimizer.betas` wants 2 items, found 1"),
        ("optimizer: {name: sgd, lr: x}", "a.yaml:6: `optimizer.lr` wants a number, found `x`"),
        ("labels: {a: x}", "a.yaml:6: `labels.a` wants an integer, found `x`"),
        ("nose: {}", f"a.yaml:6: unknown key `nose`; did you mean `noise`? keys here: {RUN_KEYS}"),
        ("qqq: 1", f"a.yaml:6: unknown key `qqq`; keys here: {RUN_KEYS}"),
        ("layers: 3", f"a.yaml:6: unknown key `layers`; did you mean `model.layers`? keys here: {RUN_KEYS}"),
        ("noise:\n  scal: 1", "a.yaml:7: unknown key `noise.scal`; did you mean `noise.scale`? keys here: shift, scale"),
        ("async_: true", f"a.yaml:6: unknown key `async_`; did you mean `async`? keys here: {RUN_KEYS}"),
        ("name: two", "a.yaml:6: the key `name` is given twice, first on line 1"),
        ("extra: !!python/object/apply:os.system [ls]", "a.yaml:6: the tag `!!python/object/apply:os.system` is not allowed; write a plain value"),
        ("extra: !!str 3", "a.yaml:6: the tag `!!str` is not allowed; write a plain value"),
        ("<<: {steps: 3}", "a.yaml:6: merge keys (`<<`) are not supported; put what is shared into a `base:` file"),
        ("? [1]\n: 2", "a.yaml:6: a key must be a word, found a list"),
        ("extra: *gone", "a.yaml:6: the alias `*gone` names no anchor defined above it"),
        ("extra: &loop [*loop]", "a.yaml:6: the alias `*loop` names no anchor defined above it"),
        ("extra: " + "[" * 3000, "a.yaml:6: values are nested deeper than 40 levels"),
        ("extra:\n\t- x", "a.yaml:7: not valid YAML: while scanning for the next token, found character '\\t' that cannot start any token; indent with spaces"),
        ("extra: [1\nb: 2", "a.yaml:7: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'"),
        ("extra: \x01", "a.yaml:6: not valid YAML: the control character '\\x01'"),
        ("---\nb: 1", "a.yaml:6: not valid YAML: expected a single document in the stream, but found another document"),
        ("base: {a: 1}", "a.yaml:6: `base` wants a path or a list of paths, found a mapping"),
        ("base: b.yaml", "a.yaml:6: the base file b.yaml does not exist"),
        ("base: .", "a.yaml:6: the base file . is a folder, not a plain file; give the path of a YAML file in UTF-8"),
        ("base: a.yaml", "a.yaml:6: base files go in a circle: a.yaml -> a.yaml"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_sentence_with_its_line(refusal, lines, sentence):
    assert refusal(GOOD + lines) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a.yaml: the file is empty; a mapping of keys is wanted"),
        ("# nothing\n", "a.yaml: the file is empty; a mapping of keys is wanted"),
        ("~", "a.yaml: the file is empty; a mapping of keys is wanted"),
        ("- 1", "a.yaml:1: the top level must be a mapping of keys, found a list"),
        ("word", "a.yaml:1: the top level must be a mapping of keys, found `word`"),
        (b"name: \xff", "a.yaml: the run description is not UTF-8 text (byte 6); give the path of a YAML file in UTF-8"),
        (b"#" * (MAX_BYTES + 1), "a.yaml: the run description has 1,000,001 bytes where at most 1,000,000 are wanted; give the path of a YAML file in UTF-8"),
        (
            "name: x\nmodel:\n  hidden: 8\ndata: {train: []}",
            "a.yaml:2: missing required key `model.layers`, which wants an integer\n"
            "a.yaml:4: `data.train` must have at least 1 item, found a list",
        ),
        (
            "steps: 1",
            "a.yaml: missing required key `model.layers`, which wants an integer\n"
            "a.yaml: missing required key `data.train`, which wants a list\n"
            "a.yaml: missing required key `name`, which wants text",
        ),
        (GOOD.replace("layers: 2", "layers: 2, heads: 7"), "a.yaml:2: `model`: hidden 64 must be a multiple of heads 7"),
        (GOOD.replace("path: corpus", "weight: 0"), "a.yaml:5: missing required key `data.train.0.path`, which wants text\n"
                                                   "a.yaml:5: `data.train.0.weight` must be greater than 0, found `0`"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_as_a_whole_is_told(refusal, text, sentence):
    assert sorted(refusal(text).splitlines()) == sorted(sentence.splitlines())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps", "command line: `steps` is not of the form key.sub=value"),
        ("=3", "command line: `=3` is not of the form key.sub=value"),
        ("a..b=3", "command line: `a..b=3` is not of the form key.sub=value"),
        ("--steps=3", "command line: `--steps=3` is not of the form key.sub=value"),
        ("steps=", "command line: `steps` wants an integer, found nothing (null)"),
        ("steps=ten", "command line: `steps` wants an integer, found `ten`"),
        ("model.layers=0", "command line: `model.layers` must be greater than 0, found `0`"),
        ("model.laiers=1", "command line: unknown key `model.laiers`; did you mean `model.layers`? keys here: layers, hidden, heads, qk_norm"),
        ("model.hidden=60", "a.yaml:2 (with hidden from the command line): `model`: hidden 60 must be a multiple of heads 8"),
        ("extra=[1, 2", "command line: the value of `extra`: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("data.train.2.path=x", "command line: `data.train` is a list of 1, so `data.train.2` must name an item from 0 to 1"),
        ("data.train.x=x", "command line: `data.train` is a list of 1, so `data.train.x` must name an item from 0 to 1"),
        ("name=null", "command line: `name` wants text, found nothing (null); put it in quotes to mean the text null"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_told_as_such(refusal, override, sentence):
    assert refusal(GOOD, override) == sentence


def test_all_mistakes_are_told_at_once(refusal):
    lines = refusal(GOOD + "steps: x\nkeep: y\n", "flops=z").splitlines()
    assert lines == [
        "a.yaml:6: `steps` wants an integer, found `x`",
        "a.yaml:7: `keep` wants true or false, found `y`",
        "command line: `flops` wants a number or null, found `z`",
    ]


def test_an_alias_bomb_is_refused_before_it_is_built(refusal):
    ones = ", ".join("1" * 10)
    lines = [f"a0: &a0 [{ones}]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert refusal("\n".join(lines)) == "a.yaml:5: more than 50000 values once aliases are written out"


def test_a_missing_file_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^gone\.yaml: the run description does not exist$"):
        load_config("gone.yaml", [], Run)


@pytest.mark.parametrize("name", ["run.md", "run", "run.yaml.orig", "rum.txt"])
def test_only_yaml_files_are_suggested_for_a_missing_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"^rum\.yaml: the run description does not exist$"):
        load_config("rum.yaml", [], Run)
    (tmp_path / "run.yml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"^rum\.yaml: the run description does not exist; did you mean run\.yml\?$"):
        load_config("rum.yaml", [], Run)


def test_base_files_lie_under_the_file_and_overrides_on_top(load, tmp_path):
    """Relative to the file naming them, recursive, later over earlier; mappings merge, lists replace."""
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases/deep.yaml").write_text("steps: 1\nmodel: {layers: 1, hidden: 8}\nflops: 5\nkeep: yes\n")
    (tmp_path / "bases/one.yaml").write_text("base: deep.yaml\nsteps: 2\nlabels: {a: 1}\nextra: [1, 2, 3]\n")
    (tmp_path / "bases/two.yaml").write_text("base: deep.yaml\nlabels: {b: 2}\nflops: 6\n")
    text = GOOD + "base: [bases/one.yaml, bases/two.yaml]\nextra: [9]\n"
    config = load(text, "model.heads=4", "labels={c: 3}")
    assert config.steps == 1  # two.yaml's own base comes after one.yaml
    assert config.flops == 6
    assert config.keep is True
    assert config.labels == {"a": 1, "b": 2, "c": 3}
    assert config.extra == [9]
    assert config.model == Model(layers=2, hidden=8, heads=4)


def test_a_mistake_in_a_base_file_names_that_file(refusal, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.yaml").write_text("base: ../c.yaml\n\nsteps: x\n")
    (tmp_path / "c.yaml").write_text("keep: maybe\nqq: 1\n")
    assert refusal(GOOD + "base: sub/b.yaml").splitlines() == [
        "c.yaml:1: `keep` wants true or false, found `maybe`",
        f"c.yaml:2: unknown key `qq`; keys here: {RUN_KEYS}",
        "sub/b.yaml:3: `steps` wants an integer, found `x`",
    ]


def test_a_circle_of_base_files_is_refused_and_a_diamond_is_not(load, refusal, tmp_path):
    (tmp_path / "b.yaml").write_text("base: c.yaml\n")
    (tmp_path / "c.yaml").write_text("steps: 7\n")
    assert load(GOOD + "base: [b.yaml, c.yaml]").steps == 7
    (tmp_path / "c.yaml").write_text("base: a.yaml\n")
    want = "c.yaml:1: base files go in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml"
    assert refusal(GOOD + "base: b.yaml") == want


def test_overrides_reach_into_lists_and_keep_text_as_typed(load):
    config = load(
        GOOD, "data.train.0.path=a: b #c", "data.train.1.path=no", "data.train.1.weight=2", "steps=3", "steps=4"
    )
    assert config.data.train == [Source(path="a: b #c"), Source(path="no", weight=2.0)]
    assert config.steps == 4
    assert load("name: x\nmodel: {layers: 1}\n", "data.train.0.path=x").data.train == [Source(path="x")]
    assert load(GOOD, "data.train=[{path: y}]").data.train == [Source(path="y")]


def test_an_override_can_choose_among_kinds_of_section(load):
    assert load(GOOD, "optimizer={name: adam}", "optimizer.lr=1").optimizer == Adam(name="adam", lr=1.0)
    assert load(GOOD, "optimizer.name=sgd").optimizer == Sgd()


def test_an_early_validator_may_take_what_its_type_does_not(load, refusal):
    """`shift: masked` on a float field, say, with a validator that turns the word into -1000."""

    class Named(Section):
        shift: float = 0.0
        other: int = 0

        @field_validator("shift", mode="before")
        @classmethod
        def by_name(cls, value: object) -> object:
            if isinstance(value, str):
                if value != "masked":
                    raise ValueError(f"no noise is called {value}")
                return -1000.0
            return value

    assert load("shift: masked", model=Named).shift == -1000.0
    assert load("shift: 2e0", model=Named).shift == 2.0
    with pytest.raises(ConfigError, match=r"^a\.yaml:1: `shift`: no noise is called odd$"):
        load("shift: odd", model=Named)
    with pytest.raises(ConfigError) as caught:
        load("other: x\nshift: odd", model=Named)
    assert str(caught.value).splitlines() == [
        "a.yaml:1: `other` wants an integer, found `x`",
        "a.yaml:2: `shift`: no noise is called odd",
    ]


class Colour(enum.Enum):
    RED = "red"
    ON = "on"


class Kinds(Section):
    """Types that no word looks like, and words that look like another type."""

    path: Path = Path("x")
    paths: list[Path] = Field(default_factory=list)
    colour: Colour = Colour.RED
    names: frozenset[str] = frozenset()
    pairs: tuple[tuple[int, str], ...] = ()
    mode: Literal["true", "1", "1e3", "null"] | None = None
    level: bool | Literal["auto"] | int = "auto"
    sources: tuple[Source, ...] = ()
    size: float | Literal["small"] = "small"
    noise: Noise = Noise()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("path", "1e5", Path("1e5")),
        ("paths", "[no, 3]", [Path("no"), Path("3")]),
        ("colour", "on", Colour.ON),
        ("names", "[a, 1e5, no]", frozenset({"a", "1e5", "no"})),
        ("pairs", "[[1e1, no], [2, 3]]", ((10, "no"), (2, "3"))),
        ("mode", "true", "true"),
        ("mode", "1", "1"),
        ("mode", "1e3", "1e3"),
        ("mode", "null", None),
        ("mode", "'null'", "null"),
        ("level", "on", True),
        ("level", "auto", "auto"),
        ("level", "1e2", 100),
        ("noise", "null", Noise()),
    ],
)
def test_a_word_is_read_as_whatever_type_its_field_has(load, key, text, value):
    for found in (load(f"{key}: {text}", model=Kinds), load("{}", f"{key}={text}", model=Kinds)):
        assert getattr(found, key) == value
        assert type(getattr(found, key)) is type(value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("colour: blue", "a.yaml:1: `colour` wants one of red, on, found `blue`"),
        ("names: a", "a.yaml:1: `names` wants a list, found `a`; a list of one item is written [a]"),
        ("pairs: [[1]]", "a.yaml:1: `pairs.0` wants 2 items, found 1"),
        ("pairs: [[1, a], [b, c]]", "a.yaml:1: `pairs.1.0` wants an integer, found `b`"),
        ("mode: false", "a.yaml:1: `mode` wants one of true, 1, 1e3, null or null, found `false`"),
        ("level: '1'", "a.yaml:1: `level` wants true or false or auto or an integer, found the quoted text '1'"),
        ("sources: [3]", "a.yaml:1: `sources.0` wants a mapping of keys, found `3`"),
        ("size: .inf", "a.yaml:1: `size` must be a finite number, found `.inf`"),
        ("size: smal", "a.yaml:1: `size` wants a number or small, found `smal`; did you mean `small`?"),
        ("path:", "a.yaml:1: `path` wants a path, found nothing (null)"),
    ],
)
def test_a_value_of_such_a_field_is_refused_in_its_words(load, line, sentence):
    with pytest.raises(ConfigError) as caught:
        load(line, model=Kinds)
    assert str(caught.value) == sentence


def test_alternatives_that_read_a_word_each_in_its_way(load, refusal):
    """The text of one kind of section must not stay text for the other."""

    class Text(Section):
        kind: Literal["text"]
        value: str

    class Number(Section):
        kind: Literal["number"]
        value: int = Field(ge=0)
        sizes: tuple[int, ...] = ()

    class Either(Section):
        one: Text | Number

    assert load("one: {kind: text, value: 3}", model=Either).one == Text(kind="text", value="3")
    number = Number(kind="number", value=1000, sizes=(1, 20))
    assert load("one: {kind: number, value: 1e3, sizes: [1, 2e1]}", model=Either).one == number
    with pytest.raises(ConfigError, match=r"^a\.yaml:1: `one\.value` must be greater than or equal to 0, found `-1`$"):
        load("one: {kind: number, value: -1, sizes: []}", model=Either)


def test_a_missing_section_is_read_as_an_empty_one(load):
    class Length(Section):
        steps: int | None = None

        @model_validator(mode="after")
        def _is_given(self) -> Length:
            if self.steps is None:
                raise ValueError("give steps")
            return self

    class Outer(Section):
        length: Length
        inner: Kinds
        model: Model

    with pytest.raises(ConfigError) as caught:
        load("{}", model=Outer)
    assert str(caught.value).splitlines() == [
        "a.yaml: `length`: give steps",
        "a.yaml: missing required key `model.layers`, which wants an integer",
    ]


def test_what_is_dumped_loads_back_equal(load):
    config = load(
        GOOD, "flops=1.2345678901234567e22", "name=12:30", "note=~x", "noise.shift=uniform", "optimizer={name: adam}"
    )
    text = dump_config(config)
    assert load(text) == config
    assert list(yaml.safe_load(text)) == RUN_KEYS.split(", ")
    assert dump_config(load(text)) == text


TEXT = st.characters(codec="utf-8", exclude_characters="\0")


@given(
    name=st.text(TEXT, max_size=20),
    note=st.none() | st.text(TEXT, max_size=20),
    flops=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    labels=st.dictionaries(st.text(TEXT, max_size=5).filter(lambda key: key != "<<"), st.integers(-9, 9)),
    cooldown=st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False),
)
@settings(max_examples=60, deadline=None)
def test_any_text_and_number_survives_the_dump(tmp_path_factory, name, note, flops, labels, cooldown):
    run = Run(
        name=name,
        model=Model(layers=1),
        data=Data(train=[Source(path="x")]),
        note=note,
        flops=flops,
        labels=labels,
        cooldown=cooldown,
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(run), encoding="utf-8")
    assert load_config(path, [], Run) == run


def test_the_schema_knows_base_and_every_key():
    schema = json_schema(Run)
    assert list(schema["properties"]) == ["base", *RUN_KEYS.split(", ")]
    assert schema["additionalProperties"] is False
    assert copy.deepcopy(schema) == json_schema(Run)
