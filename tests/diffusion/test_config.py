"""Run descriptions of noise, conditioning and objective."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megadiff.diffusion.config import ConditioningConfig, NoiseConfig, ObjectiveConfig, check_noise_and_objective
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
    noise = NoiseConfig.model_validate({"shift": given})
    assert noise.shift_value == value
    assert noise.shift_name == name


def test_the_defaults_are_the_papers():
    noise, objective = NoiseConfig(), ObjectiveConfig()
    assert (noise.shift_value, noise.scale, noise.min_log_snr, noise.max_log_snr, noise.rate) == (0, 1, -9, 9, "linear")
    assert (objective.weighting, objective.is_weight, objective.reduction) == ("surrogate", 1.0, "mean")
    conditioning = ConditioningConfig()
    assert (conditioning.independent, conditioning.prompt, conditioning.empty) == (0, 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 1.5}, "scale must be at most 1, got 1.5: above 1 the rate .* is negative"),
        ({"scale": 0}, "greater than 0"),
        ({"min_log_snr": 9}, "min_log_snr < max_log_snr"),
        ({"shift": "mask"}, "masked"),
        ({"rate": "sqrt"}, "linear"),
        ({"schift": 1}, "Extra inputs"),
        ({"form": "time", "shift": "balanced"}, "noise.form is time, which has no shift: leave out .* to null"),
        ({"form": "time", "scale": 1, "rate": "cosine"}, "which has no scale, rate"),
        ({"form": "time", "min_log_snr": -9}, "which has no min_log_snr"),
        ({"p_uniform": 0.0}, "noise.form is snr, which has no p_uniform: .* set noise.form to time"),
        ({"form": "snr", "gamma": 1, "time_eps": 1e-3}, "which has no gamma, time_eps"),
        ({"form": "time", "p_uniform": 1}, "less than 1"),
        ({"form": "time", "gamma": 3}, "gamma must be at most 2, got 3.0: .* negative rate"),
        ({"form": "time", "time_eps": 0.5}, "less than 0.5"),
        ({"form": "logit"}, "snr"),
    ],
)
def test_noise_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        NoiseConfig.model_validate(settings)


def test_null_takes_a_setting_back():
    base = {"shift": "uniform", "rate": "linear", "min_log_snr": -9}
    noise = NoiseConfig.model_validate({**base, "form": "time", **dict.fromkeys(base)})
    assert noise == NoiseConfig.model_validate({"form": "time"})


@pytest.mark.parametrize("given", [{}, {"shift": 2.5, "rate": "cosine"}, {"form": "time", "p_uniform": 0.2}])
def test_resolved_noise_reads_back_as_itself_and_holds_one_form(given):
    noise = NoiseConfig.model_validate(given)
    for mode in ("python", "json"):
        assert NoiseConfig.model_validate(noise.model_dump(mode=mode)) == noise
    assert ("shift" in noise.model_dump()) == (noise.form == "snr")
    assert ("p_uniform" in noise.model_dump()) == (noise.form == "time")


def test_dynamic_weights_need_the_time_form():
    objective = ObjectiveConfig(weighting="dynamic")
    check_noise_and_objective(NoiseConfig(form="time"), objective)
    check_noise_and_objective(NoiseConfig(), ObjectiveConfig(weighting="elbo"))
    with pytest.raises(ConfigError, match=r"weighting is dynamic, .* but noise.form is snr: set noise.form to time"):
        check_noise_and_objective(NoiseConfig(), objective)


def test_presets_are_the_code_and_the_text_of_the_paper():
    released = ConditioningConfig(preset="as_released")
    assert (released.independent, released.prompt, released.empty) == (0.2, 0.2, 0)
    described = ConditioningConfig(preset="as_described")
    assert (described.independent, described.prompt, described.empty, described.empty_law) == (0.5, 0.2, 0.2, "share")


def test_an_explicit_field_overrides_its_preset_even_with_zero():
    config = ConditioningConfig.model_validate({"preset": "as_described", "empty": 0.0, "prompt": 0})
    assert (config.independent, config.prompt, config.empty) == (0.5, 0, 0)


def test_a_resolved_description_reads_back_as_itself():
    config = ConditioningConfig(preset="as_released", prompt=0.3)
    assert ConditioningConfig.model_validate(config.model_dump()) == config


def test_level_patterns_exclude_each_other():
    with pytest.raises(ValidationError, match="add up to at most 1"):
        ConditioningConfig(independent=0.6, linear=0.6)
    with pytest.raises(ValidationError, match="preset"):
        ConditioningConfig.model_validate({"preset": "as_told"})
