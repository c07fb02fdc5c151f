import pytest
from pydantic import ValidationError

from megadiff.data.config import BatchConfig, DataConfig, SourceConfig


def test_a_bare_string_is_a_source_without_a_weight():
    config = DataConfig.model_validate({"train": ["a", {"path": "b", "weight": 2}], "tokenizer": "byte"})
    assert config.train == (SourceConfig(path="a", weight=None), SourceConfig(path="b", weight=2.0))
    assert config.valid == ()


@pytest.mark.parametrize(
    "given",
    [
        {"train": [], "tokenizer": "byte"},
        {"train": ["a"]},
        {"train": ["a"], "tokenizer": ""},
        {"train": [{"path": "a", "weight": 0}], "tokenizer": "byte"},
        {"train": [{"path": "a", "weight": float("inf")}], "tokenizer": "byte"},
        {"train": [{"path": "a", "wieght": 1}], "tokenizer": "byte"},
        {"train": [3], "tokenizer": "byte"},
    ],
)
def test_what_cannot_be_is_refused(given):
    with pytest.raises(ValidationError):
        DataConfig.model_validate(given)


@pytest.mark.parametrize("given", [{"global_batch_size": 0, "micro_batch_size": 1}, {"global_batch_size": 8}])
def test_a_batch_needs_two_positive_numbers(given):
    with pytest.raises(ValidationError):
        BatchConfig.model_validate(given)


def test_every_setting_says_what_it_is():
    for section in (SourceConfig, DataConfig, BatchConfig):
        assert all(field.description for field in section.model_fields.values())
