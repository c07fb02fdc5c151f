"""The gradient noise scale: of planted problems, equal on every layout, and without a trace in the run."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from megadiff.data.config import BatchSizes
from megadiff.errors import ConfigError
from megadiff.platform.quiet import quiet
from megadiff.scaling.noise_scale import Components
from megadiff.train.hooks.gradient_noise import (
    GradientNoise,
    components,
    cost_share,
    describe,
    last_measurements,
    repeated_sequences,
    summary,
)
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, MODERN_BLOCK, read_metrics, toy_config, wire_on_rank

with quiet():
    import torch

    from megadiff.testing.hooks import check_hook
    from megadiff.testing.toy_run import LAYOUTS
    from megadiff.train.hooks.gradient_noise import sums_of_squares

SIZE, ROWS, DRAWS = 4, 4, 2


class Quadratic:
    """The loss of a microbatch, sum over sequences of (theta - x)' H (theta - x) / 2, with x = data + corruption."""

    def __init__(self, dim=300, seed=0):
        rng = np.random.default_rng(seed)
        self.curvature = torch.from_numpy(rng.uniform(0.2, 2.0, dim))
        self.theta = torch.from_numpy(rng.normal(0, 0.15, dim)).requires_grad_()
        self.data, self.corruption = rng.uniform(0.2, 1.5, dim), rng.uniform(0.1, 1.0, dim)
        self.rng = rng
        squares = self.curvature.numpy() ** 2
        self.trace_data = float(squares @ self.data**2)
        self.trace_noise = float(squares @ self.corruption**2)
        self.signal = float(squares @ self.theta.detach().numpy() ** 2)

    def group(self):
        """Microbatches of a group: sequences, then draws."""
        dim = len(self.data)
        clean = self.rng.normal(size=(ROWS, SIZE, dim)) * self.data
        return [[x + self.rng.normal(size=(SIZE, dim)) * self.corruption for _ in range(DRAWS)] for x in clean]

    def gradient(self, microbatch):
        away = self.theta - torch.from_numpy(microbatch)
        loss = (away.square() * self.curvature).sum() / 2
        first, second = torch.autograd.grad(loss, self.theta)[0].float().tensor_split(2)
        return [first, second]


@pytest.fixture(scope="module")
def planted():
    problem = Quadratic()
    groups = []
    for _ in range(150):
        sums = sums_of_squares(problem.group(), problem.gradient, device="cpu")
        groups.append(components(sums.tolist(), ROWS, DRAWS, SIZE))
    return problem, groups


def test_a_planted_quadratic_has_its_noise_scale_and_both_parts(planted):
    problem, groups = planted
    found = summary(groups, seq_length=16)
    wanted = (problem.trace_data + problem.trace_noise) / problem.signal
    assert 50 < wanted < 1000, "groups of 16 sequences are far below the scale"
    assert found["gradient_noise/scale"] == pytest.approx(wanted, rel=0.1)
    assert found["gradient_noise/scale_tokens"] == pytest.approx(16 * found["gradient_noise/scale"])
    assert found["gradient_noise/trace_data"] == pytest.approx(problem.trace_data, rel=0.03)
    assert found["gradient_noise/trace_noise"] == pytest.approx(problem.trace_noise, rel=0.03)
    assert found["gradient_noise/norm_squared"] == pytest.approx(problem.signal, rel=0.1)


def test_the_jackknife_error_is_that_of_repeated_measurements(planted):
    """Ten windows of 15 groups: their scatter is their mean error within what ten values can tell."""
    _, groups = planted
    windows = [summary(groups[start : start + 15], seq_length=1) for start in range(0, 150, 15)]
    for figure in ("scale", "noise_share"):
        values = [window[f"gradient_noise/{figure}"] for window in windows]
        errors = [window[f"gradient_noise/{figure}_stderr"] for window in windows]
        assert 0.4 < np.std(values, ddof=1) / np.mean(errors) < 2.0, figure


def test_the_parts_sum_to_the_whole_of_distinct_sequences(planted):
    """The variance of gradients that share neither sequence nor draw, as two batch sizes give it."""
    problem, groups = planted
    singles = [np.asarray(torch.cat(problem.gradient(problem.group()[0][0])), dtype=float) for _ in range(400)]
    whole = SIZE * np.var(np.array(singles) / SIZE, axis=0, ddof=1).sum()
    data, noise, _ = (np.mean(values) for values in zip(*groups, strict=True))
    assert data + noise == pytest.approx(whole, rel=0.03)
    assert data == pytest.approx(problem.trace_data, rel=0.03)


def test_what_groups_do_not_determine_is_left_open():
    drowned = summary([Components(1.0, 2.0, -0.5), Components(1.0, 2.0, 0.25)], seq_length=8)
    assert (drowned["gradient_noise/scale"], drowned["gradient_noise/scale_stderr"]) == (None, None)
    assert drowned["gradient_noise/noise_share"] == pytest.approx(2 / 3)
    assert "drowns in its noise" in describe(drowned)
    one_sided = summary([Components(1.0, 2.0, -0.1), Components(1.0, 2.0, 0.3)], seq_length=8)
    assert one_sided["gradient_noise/scale"] == pytest.approx(30)
    assert one_sided["gradient_noise/scale_stderr"] is None
    assert describe(one_sided) == "gradient noise scale 30 sequences (240 tokens), 67% of its variance from noise draws"


@pytest.mark.parametrize("data", [1, 2, 8])
@pytest.mark.parametrize("pipeline", [1, 4])
@pytest.mark.parametrize("in_step", [1, 4])
def test_the_default_costs_less_than_one_percent_on_any_layout(data, pipeline, in_step):
    settings = SimpleNamespace(every=2000, groups=2, microbatches=4, draws=2)
    batch = SimpleNamespace(global_batch_size=3 * data * in_step, micro_batch_size=3)
    layout = SimpleNamespace(data=data, pipeline=pipeline)
    context = SimpleNamespace(topology=SimpleNamespace(layout=layout), config=SimpleNamespace(batch=batch))
    assert 0 < cost_share(settings, context) <= 0.008


def test_measurements_before_half_the_steps_are_not_averaged_in():
    measured = {step: [Components(1.0, 2.0, 3.0)] for step in range(2000, 18000, 2000)}
    assert list(last_measurements(measured, 8)) == [8000, 10000, 12000, 14000, 16000]
    assert list(last_measurements(measured, 2)) == [14000, 16000]
    hook, other = GradientNoise(None, None), GradientNoise(None, None)
    hook._measured = measured
    other.restore(json.loads(json.dumps(hook.state())))
    assert other._measured == measured


@pytest.mark.parametrize(
    ("source", "every", "steps", "validation", "sentence"),
    [
        ("train", 2000, 5000, 0, ""),
        ("train", 1, 5000, 0, "takes 32 sequences, of which the next one takes some again after 16,"),
        ("train", 1999, 3999, 0, "takes some again after 16,"),
        ("validation", 2000, 5000, 64, ""),
        ("validation", 2000, 5000, 63, "the 63 validation sequences come around again within the 2 measurements of 32"),
    ],
)
def test_measurements_that_share_sequences_are_warned_of(source, every, steps, validation, sentence):
    settings = SimpleNamespace(every=every, groups=2, microbatches=4, source=source)
    sizes = BatchSizes(16)
    config = SimpleNamespace(steps=steps, sizes=sizes, batch=SimpleNamespace(micro_batch_size=4))
    context = SimpleNamespace(config=config, gradients=SimpleNamespace(validation=[range(validation)]))
    found = repeated_sequences(settings, context)
    assert sentence in found
    assert bool(found) == bool(sentence)


ENTRY = {"name": "gradient_noise", "every": 2, "groups": 4, "microbatches": 2, "window": 2}
MODEL = {f"model__{key}": value for key, value in GIDD_BLOCK.items()} | {"model__layers": 4}
MODELS = {"gidd": MODEL, "tied tables": {f"model__{key}": value for key, value in MODERN_BLOCK.items()}}
SHARED = {"schedule": {"steps": 1, "warmup_steps": 1}, "data__valid": [], "hooks": [ENTRY]}
"""A step of rate 0, so that every layout measures the same weights."""
SPLITS = {
    "one": (1, {}),
    "tensor": (2, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pipeline": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "data": (2, {"parallel__distributed_optimizer": True, "parallel__overlap_grad_reduce": True}),
    "all": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
}


def _measured(config, world_size):
    run = wire_on_rank(config, world_size)
    run.hooks = [hook for hook in run.hooks if hook is not run.checkpoint]
    run.train()


def _all_measured(configs, world_size):
    for config in configs:
        _measured(config, world_size)


@pytest.fixture(scope="module")
def measured(toy_corpus, tmp_path_factory):
    """`{(model, split): figures}`; each number of ranks is started once for all its runs."""
    folder, found = tmp_path_factory.mktemp("splits"), {}
    for ranks in (1, 2, 4):
        configs = {
            (model, split): toy_config(toy_corpus, folder / model, name=split, **SHARED, **MODELS[model], **settings)
            for model in MODELS
            for split, (count, settings) in SPLITS.items()
            if count == ranks
        }
        on_ranks(ranks, _all_measured, list(configs.values()), ranks)
        for case, config in configs.items():
            lines = [line for line in read_metrics(config.folder / "metrics.jsonl") if "gradient_noise/scale" in line]
            found[case] = {key: value for line in lines for key, value in line.items()}
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("model", MODELS)
def test_the_figures_are_equal_on_one_two_and_four_ranks(measured, model, split):
    one = measured[model, "one"]
    assert one["step"] == 1
    assert one["gradient_noise/trace_noise"] > 0
    assert one["gradient_noise/norm_squared"] != 0
    assert measured[model, split] == pytest.approx(one, rel=1e-5)


def _state_around(config):
    """Tensors of the run before and after a measurement."""
    run = wire_on_rank(config, 1)
    run.step([next(run.microbatches) for _ in range(run.microbatches_of(0))], 1e-3)
    hook = next(hook for hook in run.hooks if getattr(hook, "name", "") == "gradient_noise")

    def state():
        parameters = [parameter for chunk in run.step.chunks for parameter in chunk.parameters()]
        inner = run.step.optimizer.state_dict() if hasattr(run.step.optimizer, "state_dict") else {}
        return [
            *(parameter.detach().clone() for parameter in parameters),
            *(parameter.main_grad.clone() for parameter in parameters),
            torch.get_rng_state(),
            torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
            *(value.clone() for value in _tensors(inner)),
        ]

    before = state()
    hook.hook._measure(1)
    after = state()
    run.close()
    return len(before), [torch.equal(one, other) for one, other in zip(before, after, strict=True)]


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def test_a_measurement_leaves_no_trace(toy_corpus, tmp_path):
    count, same = on_ranks(1, _state_around, toy_config(toy_corpus, tmp_path, **SHARED, **MODEL))[0]
    assert count > 100
    assert all(same)


def test_the_hook_keeps_the_contract():
    check_hook(ENTRY, layouts={"data parallel": LAYOUTS["data parallel"]})


def _refused(config):
    with pytest.raises(ConfigError) as error:
        wire_on_rank(config, 1)
    return str(error.value)


def test_validation_data_are_measured_on_or_missed_in_one_sentence(toy_corpus, tmp_path):
    source = {**ENTRY, "source": "validation"}
    missing = toy_config(toy_corpus, tmp_path, **{**SHARED, **MODEL, "hooks": [source]})
    assert "source is validation, but data.valid is empty" in on_ranks(1, _refused, missing)[0]
    config = toy_config(
        toy_corpus, tmp_path, **{**SHARED, **MODEL, "hooks": [source], "data__valid": [str(toy_corpus)]}
    )
    on_ranks(1, _measured, config, 1)
    line = read_metrics(config.folder / "metrics.jsonl")[-1]
    assert math.isfinite(line["gradient_noise/trace_data"])
