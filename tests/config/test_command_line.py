"""Settings on a command line, and what is suggested for those of other trainers and for slips of the pen."""

from __future__ import annotations

import pytest

from megadiff.config import suggestions
from megadiff.config.command_line import SettingsParser, refuse_unknown, setting_without_equals, similar_key
from megadiff.config.schema import dotted_keys
from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig

KEYS = set(dotted_keys(RunConfig))


def parser() -> SettingsParser:
    made = SettingsParser()
    made.add_argument("--config")
    made.add_argument("--check", action="store_true")
    return made


def refused(*words: str) -> str:
    arguments = parser().parse_with_settings(words)
    with pytest.raises(ConfigError) as refusal:
        refuse_unknown(arguments, RunConfig)
    return str(refusal.value)


def test_every_suggested_key_exists():
    assert {key.partition("=")[0] for key in suggestions.KEY_BY_OTHER_NAME.values()} <= KEYS


def test_a_name_used_elsewhere_has_one_meaning_and_is_no_key_here():
    named = [name for names in suggestions._NAMES_BY_KEY.values() for name in names.split()]
    assert len(named) == len(set(named))
    assert not set(named) & set(suggestions.NOT_A_KEY)
    assert not (set(named) | set(suggestions.NOT_A_KEY)) & KEYS


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("hidden_size", "model.hidden"),
        ("num_layers", "model.layers"),
        ("n_layer", "model.layers"),
        ("micro_batch_size", "batch.micro_batch_size"),
        ("per_device_train_batch_size", "batch.micro_batch_size"),
        ("lr", "optimizer.lr"),
        ("training.steps", "schedule.steps"),
        ("train_iters", "schedule.steps"),
        ("--tensor-model-parallel-size", "parallel.tensor"),
        ("parallelism.pipeline_parallel_degree", "parallel.pipeline"),
        ("Learning-Rate", "optimizer.lr"),
        ("model.layers", "model.layers"),
        ("optimzer.lr", "optimizer.lr"),
        ("wieght_decay", "optimizer.weight_decay"),
        ("qqq", None),
    ],
)
def test_the_key_that_is_meant(name, key):
    assert similar_key(name, RunConfig) == key


def test_settings_and_options_may_be_mixed():
    found = parser().parse_with_settings(["a=1", "--config", "f", "b=2", "--check"])
    assert (found.overrides, found.config, found.check, found.unknown) == (["a=1", "b=2"], "f", True, [])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model.layers", "4"], "`--model.layers 4` is no option of this command; {written}: `model.layers=4`"),
        (["--lr=3e-4"], "`--lr=3e-4` is no option of this command; {written}: `optimizer.lr=3e-4`"),
        (["--lr", "a=1"], "`--lr` is no option of this command; {written}: `optimizer.lr=...`"),
        (["--chekc"], "`--chekc` is no option of this command; did you mean `--check`?"),
        (["--dropout", "0"], "`--dropout 0` is no option of this command: the model has no dropout"),
        (["-q"], "`-q` is no option of this command; {written}, and the options are --check, --config, --help"),
    ],
)
def test_an_option_the_command_lacks_is_answered_with_the_setting(words, sentence):
    assert refused(*words) == "command line: " + sentence.format(written="settings are written key.sub=value")


def test_a_wrong_value_is_refused_without_a_usage_text():
    with pytest.raises(ConfigError, match=r"^command line: argument --config: expected one argument; `.* --help`"):
        parser().parse_with_settings(["--config"])


def test_every_unknown_option_has_its_own_line():
    assert [line.split("`")[1] for line in refused("--lr", "1", "--steps", "5").splitlines()] == ["--lr 1", "--steps 5"]


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["model.layers", "4"], "model.layers=4"),
        (["model.layers", "=", "4"], "model.layers=4"),
        (["model.layers", "=4"], "model.layers=4"),
        (["model.layers:4"], "model.layers=4"),
        (["a=1", "model.layers:", "4"], "model.layers=4"),
        (["a=1", "b=x:y"], None),
        (["noise.shift"], None),
    ],
)
def test_settings_without_equals_are_written_out(words, written):
    found = setting_without_equals(words)
    assert found is None if written is None else f"`{written}`" in found
