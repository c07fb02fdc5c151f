"""The two methods of the package: keys, refusals, exports; the contract is in tests/testing/test_methods.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from megadiff.errors import ConfigError
from megadiff.methods import METHODS, MethodConfig, build_method
from megadiff.platform.quiet import quiet

with quiet():
    from megadiff.eval.likelihood import BoundSettings
    from megadiff.methods.gidd import diffusion_bound
    from megadiff.testing.methods import method_of
    from megadiff.testing.toy_run import toy_config, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus", tokens=500)


def method(corpus, folder, **settings):
    return method_of(toy_config(corpus, folder, **settings))


def test_a_run_trains_by_denoising_unless_it_says_otherwise(corpus, tmp_path):
    assert toy_config(corpus, tmp_path).method == METHODS.build(MethodConfig, name="gidd")


def test_only_a_denoiser_is_sampled(corpus, tmp_path):
    method(corpus, tmp_path).sampler()
    with pytest.raises(ConfigError, match=r"autoregressive control \(method.name is next_token\)"):
        method(corpus, tmp_path, method__name="next_token").sampler()
    with pytest.raises(ValidationError, match=r"eval.samples is 2, .* set eval.samples to 0"):
        toy_config(corpus, tmp_path, method__name="next_token", eval__samples=2)


def test_kinds_of_likelihood(corpus, tmp_path):
    denoiser, control = method(corpus, tmp_path), method(corpus, tmp_path, method__name="next_token")
    assert denoiser.estimator(BoundSettings(draws=8)).draws == 8
    assert denoiser.estimator(BoundSettings(estimator="levels")).kind == "part of the bound"
    assert (control.estimator(BoundSettings()).kind, control.estimator(BoundSettings()).draws) == ("exact", 1)
    assert (denoiser.log_snr_range, control.log_snr_range) == ((-9.0, 9.0), None)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({}, {"is_causal": False, "prompt_attention": "full"}),
        ({"conditioning__prompt": 0.2}, {"is_causal": False, "prompt_attention": "block"}),
        ({"method__name": "next_token"}, {"is_causal": True, "prompt_attention": "full"}),
    ],
)
def test_exported_keys(corpus, tmp_path, settings, keys):
    assert method(corpus, tmp_path, **settings).export_config() == keys


def test_the_bound_covers_the_paper_s_levels_and_the_run_s(corpus, tmp_path):
    narrow = method(corpus, tmp_path, noise={"shift": "masked", "min_log_snr": -3.0, "max_log_snr": 12.0}).process
    assert diffusion_bound(narrow, num_noise_levels=2).log_snr_range == (-9.0, 12.0)


@pytest.mark.parametrize("kind", ["block", "causal"])
def test_prompts_attend_in_validation_as_in_training(corpus, tmp_path, kind):
    own = method(corpus, tmp_path, conditioning={"prompt": 0.2, "prompt_attention": kind})
    clean, predicted = np.full((2, 12), 9), np.arange(12) >= np.array([[4], [7]])
    task = own.validation(num_noise_levels=2)
    found = task.objective.attention(task.batch(clean, np.arange(2), 1, predicted))
    assert (found.prefix_lengths.tolist(), found.is_causal) == ([4, 7], kind == "causal")
    text = task.objective.attention(task.batch(clean, np.arange(2), 1))
    assert text.prefix_lengths.tolist() == [0, 0]
    plain = method(corpus, tmp_path).validation(num_noise_levels=2)
    whole = plain.objective.attention(plain.batch(clean, np.arange(2), 1, predicted))
    assert whole.prefix_lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "it has none"), ("def build(settings, context):\n    return 3\n", "found int")],
)
def test_a_module_that_builds_no_method_is_refused(corpus, tmp_path: Path, monkeypatch, text, message):
    (tmp_path / "my_methods").mkdir()
    (tmp_path / "my_methods/broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    context = method(corpus, tmp_path).context
    with pytest.raises(ConfigError, match=f"method.name is my_methods.broken, .*{message}"):
        build_method(MethodConfig(name="my_methods.broken"), context)
    for name in ("my_methods", "my_methods.broken"):
        sys.modules.pop(name, None)
