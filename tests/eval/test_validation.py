"""The held-out bound of models whose worth is known, on one rank."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megadiff.errors import ConfigError
from megadiff.platform.quiet import quiet
from megadiff.train.hooks.validation import ValidationHook
from tests.support.closed_forms import blind_model
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, NOISES, toy_config, wire_on_rank

with quiet():
    from megadiff.eval.validation import EvalTask, ValidationEvaluator

SHIFTS = {"masked": -1000.0, "balanced": 0.0, "uniform": 1000.0}
SOURCES, ROWS_PER_SOURCE = 40, 16


class RandomRows:
    """Held-out sequences of random bytes."""

    seq_length = 16
    bytes_per_token = 1.0

    def __init__(self, name, count, seed):
        self.name = name
        self._sequences = np.random.default_rng(seed).integers(4, 260, size=(count, self.seq_length))

    def __len__(self):
        return len(self._sequences)

    def sequences(self, indices):
        return self._sequences[list(indices)]

    def predicted(self, indices):
        del indices

    def documents(self, indices):
        del indices


class RandomAnswers(RandomRows):
    """Random bytes of which the last few of each sequence are an answer."""

    def __init__(self, name, count, seed):
        super().__init__(name, count, seed)
        self.mask = np.arange(self.seq_length) >= np.random.default_rng(seed).integers(0, 15, size=(count, 1))

    def predicted(self, indices):
        return self.mask[list(indices)]


def measure_of(run):
    return next(hook for hook in run.hooks if isinstance(hook, ValidationHook)).evaluate


def _blind(configs, kind=RandomRows):
    """Bounds of zero-headed models on forty disjoint sets of sequences."""
    found = []
    for config in configs:
        run = wire_on_rank(config, 1)
        held_out = measure_of(run)
        sources = [kind(f"s{i}", ROWS_PER_SOURCE, seed=i) for i in range(SOURCES)]
        run.close()
        found.append(
            type(held_out)(
                sources=sources,
                task=held_out.task,
                chunks=held_out.chunks,
                topology=held_out.topology,
                device=held_out.device,
                micro_batch_size=64,
            )()
        )
    return found


@pytest.fixture(scope="module")
def blind(toy_corpus, tmp_path_factory):
    configs = [
        toy_config(
            toy_corpus,
            tmp_path_factory.mktemp(noise),
            noise__shift=noise,
            noise__schedule="cosine" if noise == "balanced" else "linear",
            model__layers=1,
            model__head_init=0.0,
            eval__num_noise_levels=3,
        )
        for noise in NOISES
    ]
    return dict(zip(NOISES, on_ranks(1, _blind, configs)[0], strict=True))


@pytest.mark.parametrize("noise", NOISES)
def test_a_blind_model_pays_log_vocabulary_under_every_noise(blind, noise):
    """Log 259 to 1e-3, the closed form to its standard error; balanced trains with another rate: it must not matter."""
    found = blind[noise]
    elbo, _ = blind_model(SHIFTS[noise], 260)
    assert elbo == pytest.approx(math.log(259), rel=1e-3)
    assert abs(found.elbo - elbo) <= 4 * found.stderr
    assert found.stderr < 0.05 * elbo
    assert found.tokens == SOURCES * ROWS_PER_SOURCE * 16


@pytest.mark.parametrize("noise", NOISES)
def test_the_standard_error_is_honest_across_disjoint_sets_of_sequences(blind, noise):
    """Squared z-scores average to about 1: 40 of them scatter by 0.22, and sequences of one set share no noise."""
    elbo, _ = blind_model(SHIFTS[noise], 260)
    scores = [(bound - elbo) / error for bound, error in blind[noise].by_source.values()]
    assert len(scores) == SOURCES
    assert 0.4 < np.square(scores).mean() < 2.2, np.square(scores).mean()
    assert abs(np.mean(scores)) < 4 / math.sqrt(SOURCES)


def test_sources_are_reported_apart_and_pooled(blind):
    found = blind["masked"]
    assert found.elbo == pytest.approx(np.mean([bound for bound, _ in found.by_source.values()]), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(found.elbo / math.log(2))
    edges = [(low, high) for low, high, _ in found.by_log_snr]
    assert edges == [(-9.0, -6.0), (-6.0, -3.0), (-3.0, 0.0), (0.0, 3.0), (3.0, 6.0), (6.0, 9.0)]


@pytest.mark.parametrize(
    "settings", [{"noise__shift": "masked"}, {"noise__shift": "uniform"}, {"method__name": "next_token"}]
)
def test_answers_alone_are_measured(settings, toy_corpus, tmp_path):
    """The closed form holds for answers of any length, with an honest error, and their tokens alone are counted."""
    config = toy_config(toy_corpus, tmp_path, **settings, model__layers=1, model__head_init=0.0)
    (found,) = on_ranks(1, _blind, [config], RandomAnswers)[0]
    assert abs(found.elbo - math.log(259)) <= 4 * found.stderr + 1e-3 * math.log(259)
    masks = [RandomAnswers("", ROWS_PER_SOURCE, seed=i).mask for i in range(SOURCES)]
    assert found.tokens == sum(int(mask.sum()) for mask in masks)
    assert found.elbo == pytest.approx(found.per_sequence.mean)
    own = np.array([bound for bound, _ in found.by_source.values()])
    weights = np.array([mask.sum() for mask in masks])
    assert found.elbo == pytest.approx(own @ weights / weights.sum())
    if "noise__shift" in settings:
        scores = [(bound - math.log(259)) / error for bound, error in found.by_source.values()]
        assert 0.3 < np.square(scores).mean() < 2.4, np.square(scores).mean()


def test_a_task_that_knows_only_text_is_refused_answers():
    unused: Any = None
    task = EvalTask(unused, lambda clean, index, level: unused, num_noise_levels=1)
    with pytest.raises(ConfigError, match="takes no fourth argument"):
        ValidationEvaluator(
            sources=[RandomAnswers("", 4, seed=1)],
            task=task,
            chunks=[],
            topology=unused,
            device=unused,
            micro_batch_size=2,
        )


def _state(run):
    parameters = [p for chunk in run.step.chunks for p in chunk.parameters()]
    return [
        *(p.detach().clone() for p in parameters),
        *(p.main_grad.clone() for p in parameters),
        torch.get_rng_state(),
        torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
    ]


def _measure_twice(config):
    """Results of two measurements around two training steps' worth of gradients, and whether anything moved."""
    run = wire_on_rank(config, 1)
    run.step([next(run.microbatches) for _ in range(run.microbatches_of(0))], 0.0)
    measure = measure_of(run)
    before = _state(run)
    found = [measure().as_metrics() for _ in range(2)]
    after = _state(run)
    run.close()
    return found, [torch.equal(a, b) for a, b in zip(before, after, strict=True)]


def test_measuring_has_no_side_effects_and_repeats_to_the_bit(toy_corpus, tmp_path):
    block = {f"model__{key}": value for key, value in GIDD_BLOCK.items()}
    found, unmoved = on_ranks(1, _measure_twice, toy_config(toy_corpus, tmp_path, **block))[0]
    assert found[0] == found[1]
    assert all(unmoved)


def _modes_of(config):
    """Modes of every module while a run's model is measured, and before and after it, of one that trains."""
    run = wire_on_rank(config, 1)
    modules = [module for chunk in run.step.chunks for module in chunk.modules()]
    seen = []

    def note(module, inputs):
        seen.append({part.training for part in modules})

    handles = [chunk.register_forward_pre_hook(note) for chunk in run.step.chunks]
    before = {part.training for part in modules}
    measure_of(run)()
    after = {part.training for part in modules}
    for handle in handles:
        handle.remove()
    run.close()
    return before, seen, after


def test_a_model_is_measured_in_evaluation_mode_and_returns_to_training(toy_corpus, tmp_path):
    """FP8 layers compute in bf16 in evaluation mode, and a model left in it would train in bf16."""
    before, seen, after = on_ranks(1, _modes_of, toy_config(toy_corpus, tmp_path))[0]
    assert seen
    assert all(modes == {False} for modes in seen)
    assert before == after == {True}
