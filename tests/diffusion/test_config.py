"""Run descriptions of noise, conditioning and objective."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megadiff.diffusion.config import ConditioningConfig, check_noise_and_objective, noise_config, objective_config
from megadiff.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "value", "name"),
    [
        ("masked", -1000, "masked"),
        ("low_uniform", -2, "low_uniform"),
        ("balanced", 0, "balanced"),
        ("high_uniform", 2, "high_uniform"),
        ("uniform", 1000, "uniform"),
        (0.5, 0.5, "shift=0.5"),
        (2, 2, "high_uniform"),
        ("-1.5", -1.5, "shift=-1.5"),
    ],
)
def test_a_shift_is_a_name_or_a_number(given, value, name):
    noise = noise_config(shift=given)
    assert noise.shift_value == value
    assert noise.shift_name == name


def test_the_defaults_are_the_papers():
    noise, objective = noise_config(), objective_config()
    assert (noise.shift_value, noise.scale, noise.min_log_snr, noise.max_log_snr, noise.schedule) == (
        0,
        1,
        -9,
        9,
        "linear",
    )
    assert (objective.weighting, objective.itakura_saito_weight, objective.reduction) == ("surrogate", 1.0, "mean")
    conditioning = ConditioningConfig()
    assert (conditioning.per_token_noise, conditioning.prompt, conditioning.pad_insertion) == (0, 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 1.5}, "scale must be at most 1, got 1.5: above 1 the rate .* is negative"),
        ({"scale": 0}, "greater than 0"),
        ({"min_log_snr": 9}, "min_log_snr < max_log_snr"),
        ({"shift": "mask"}, "masked"),
        ({"schedule": "sqrt"}, "linear"),
        ({"schift": 1}, "Extra inputs"),
        ({"process": "gidd_time", "shift": "balanced"}, "Extra inputs"),
        ({"process": "gidd_time", "schedule": "cosine"}, "Extra inputs"),
        ({"p_uniform": 0.0}, "Extra inputs"),
        ({"process": "gidd_time", "p_uniform": 1}, "less than 1"),
        ({"process": "gidd_time", "gamma": 3}, "gamma must be at most 2, got 3.0: .* negative rate"),
        ({"process": "gidd_time", "time_eps": 0.5}, "less than 0.5"),
        ({"process": "snr"}, "unknown name `snr`; .* gidd_snr, gidd_time;"),
    ],
)
def test_noise_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        noise_config(**settings)


def test_null_puts_a_default_back():
    assert noise_config(shift=None, schedule=None, min_log_snr=None, scale=0.5) == noise_config(scale=0.5)
    with pytest.raises(ValidationError, match="Extra inputs"):
        noise_config(process="gidd_time", schedule=None)


@pytest.mark.parametrize(
    "given", [{}, {"shift": 2.5, "schedule": "cosine"}, {"process": "gidd_time", "p_uniform": 0.2}]
)
def test_resolved_noise_reads_back_with_the_keys_of_its_process(given):
    noise = noise_config(**given)
    for mode in ("python", "json"):
        assert noise_config(**noise.model_dump(mode=mode)) == noise
    assert ("shift" in noise.model_dump()) == (noise.process == "gidd_snr")
    assert ("p_uniform" in noise.model_dump()) == (noise.process == "gidd_time")


def test_dynamic_weights_need_the_process_in_time():
    objective = objective_config(weighting="dynamic")
    check_noise_and_objective(noise_config(process="gidd_time"), objective)
    check_noise_and_objective(noise_config(), objective_config(weighting="elbo"))
    with pytest.raises(ConfigError, match=r"weighting is dynamic, .* but noise.process is gidd_snr: set noise.process"):
        check_noise_and_objective(noise_config(), objective)


def test_presets_are_the_code_and_the_text_of_the_paper():
    released = ConditioningConfig(preset="as_released")
    assert (released.per_token_noise, released.prompt, released.pad_insertion) == (0.2, 0.2, 0)
    described = ConditioningConfig(preset="as_described")
    assert (described.per_token_noise, described.prompt, described.pad_insertion) == (0.5, 0.2, 0.2)
    assert described.pad_insertion_law == "share"


def test_an_explicit_field_overrides_its_preset_even_with_zero():
    config = ConditioningConfig.model_validate({"preset": "as_described", "pad_insertion": 0.0, "prompt": 0})
    assert (config.per_token_noise, config.prompt, config.pad_insertion) == (0.5, 0, 0)


def test_a_resolved_description_reads_back_as_itself():
    config = ConditioningConfig(preset="as_released", prompt=0.3)
    assert ConditioningConfig.model_validate(config.model_dump()) == config


def test_level_patterns_exclude_each_other():
    with pytest.raises(ValidationError, match="add up to at most 1"):
        ConditioningConfig(per_token_noise=0.6, linear_noise=0.6)
    with pytest.raises(ValidationError, match="preset"):
        ConditioningConfig.model_validate({"preset": "as_told"})
