"""The layout changes nothing: some steps of the real wiring on several ranks against one process."""

from __future__ import annotations

import os

import pytest

from tests.support.ranks import on_ranks
from tests.support.runs import (
    GIDD_BLOCK,
    MODERN_BLOCK,
    NOISES,
    largest_relative_difference,
    merged_sequences,
    toy_config,
    train_all,
)

pytestmark = pytest.mark.timeout(1200)

STEPS = int(os.environ.get("MEGADIFF_LAYOUT_STEPS", "6"))

TWO_RANKS = {
    "tp2": {"parallel__tensor": 2},
    "tp2_sp": {"parallel__tensor": 2, "parallel__sequence": True},
    "pp2": {"parallel__pipeline": 2},
    "pp2_vp2": {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2},
    "dp2": {},
    "dp2_distopt": {"parallel__distributed_optimizer": True},
    "dp2_distopt_overlap": {
        "parallel__distributed_optimizer": True,
        "parallel__overlap_grad_reduce": True,
        "parallel__overlap_param_gather": True,
    },
    "dp2_micro1": {"batch__micro_batch_size": 1},
    "dp2_micro4": {"batch__micro_batch_size": 4},
}
EIGHT_RANKS = {
    "tp2_pp2_dp2_sp_distopt": {
        "parallel__tensor": 2,
        "parallel__pipeline": 2,
        "parallel__sequence": True,
        "parallel__distributed_optimizer": True,
    },
}
LAYOUTS = {**TWO_RANKS, **EIGHT_RANKS}

PLAIN = {noise: {"noise__shift": noise} for noise in NOISES}
GIDD = {
    "noise__shift": "low_uniform",
    **{f"model__{key}": value for key, value in GIDD_BLOCK.items()},
    "model__seq_length": 20,
    "optimizer__lr": 0.3,
    "optimizer__clip_grad": 0.0,
    "optimizer__parametrisation": "completep",
    "conditioning__per_token_noise": 0.5,
    "conditioning__pad_insertion": 0.2,
    "conditioning__prompt": 0.5,
    "conditioning__prompt_attention": "causal",
    "objective__reduction": "sum",
    "eval__sequences": 5,
}
BF16 = {"precision__compute": "bf16"}
NEXT_TOKEN = {"method__name": "next_token"}
MUON = {"optimizer__name": "muon", "optimizer__lr": 1e-2}
MODERN = {"noise__shift": "balanced", **{f"model__{key}": value for key, value in MODERN_BLOCK.items()}}
VARIANTS = {
    **PLAIN,
    "gidd": GIDD,
    "next_token": NEXT_TOKEN,
    "bf16": BF16,
    "muon": MUON,
    "modern": MODERN,
    "modern muon": {**MODERN, **MUON},
}

GIDD_LAYOUTS = ("tp2_sp", "pp2", "dp2_distopt", *EIGHT_RANKS)
BF16_LAYOUTS = {"dp2_distopt": 1e-6, "pp2": 1e-6, "tp2": 1e-2}
"""Each with the relative difference allowed: what is cut by sequences or layers adds up in the same order."""

MODERN_LAYOUTS = ("tp2", "tp2_sp", "pp2", "pp2_vp2", "dp2_distopt_overlap", *EIGHT_RANKS)
"""Layouts of the modern block, whose noise is balanced; the plain block has the other noises there."""

CASES = [
    *((layout, noise) for layout in LAYOUTS for noise in NOISES if noise != "balanced" or layout not in MODERN_LAYOUTS),
    *((layout, "gidd") for layout in GIDD_LAYOUTS),
    *((layout, "next_token") for layout in ("tp2_sp", "pp2_vp2")),
    *((layout, "modern") for layout in MODERN_LAYOUTS),
    *((layout, "modern muon") for layout in ("tp2_sp", "dp2_distopt")),
    *((layout, "muon") for layout in ("tp2", "pp2_vp2", "dp2_distopt", *EIGHT_RANKS)),
]


@pytest.fixture(scope="module")
def trained(toy_corpus, tmp_path_factory):
    """`{(layout, variant): results by rank}`; each number of ranks is started once for all its runs."""
    output = tmp_path_factory.mktemp("runs")

    def on(world_size, layouts, cases):
        configs = [
            toy_config(
                toy_corpus,
                output,
                name=f"{layout}-{variant}",
                schedule__steps=STEPS,
                **VARIANTS[variant],
                **layouts[layout],
            )
            for layout, variant in cases
        ]
        ranks = on_ranks(world_size, train_all, configs, world_size, timeout_s=1000)
        return {case: [rank[i] for rank in ranks] for i, case in enumerate(cases)}

    two = [case for case in CASES if case[0] in TWO_RANKS] + [(layout, "bf16") for layout in BF16_LAYOUTS]
    eight = [case for case in CASES if case[0] in EIGHT_RANKS]
    return {
        **on(1, {"one": {}}, [("one", variant) for variant in VARIANTS]),
        **on(2, TWO_RANKS, two),
        **on(8, EIGHT_RANKS, eight),
    }


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_a_layout_gives_the_curve_of_one_process(trained, layout, variant):
    one, many = trained["one", variant][0], trained[layout, variant][0]
    assert [line["step"] for line in many.lines] == list(range(1, STEPS + 1))
    for key, tolerance in {"loss": 1e-5, "elbo": 1e-5, "kl": 1e-5, "weight": 1e-6, "grad_norm": 1e-4}.items():
        difference = largest_relative_difference(many.curve(key), one.curve(key))
        assert difference <= tolerance, (key, difference)
    assert many.curve("noisy_tokens") == one.curve("noisy_tokens")


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_all_ranks_together_see_one_process_noised_sequences_to_the_bit(trained, layout, variant):
    one = trained["one", variant][0].sequence_hashes
    assert sorted(one) == list(range(8 * STEPS))
    assert merged_sequences(trained[layout, variant]) == one


@pytest.mark.parametrize(("layout", "variant"), CASES)
def test_the_held_out_bound_is_the_same_on_every_layout(trained, layout, variant):
    """Before the first step with drawn weights, and after the last; 7 and 5 sequences divide by nothing here."""
    one, many = trained["one", variant][0].evaluations, trained[layout, variant][0].evaluations
    assert [line["step"] for line in many] == [0, STEPS]
    # Next-token losses before training lie within 0.02 of each other, so float32's rounding shows in their spread.
    stderr = 3e-6 if variant == "next_token" else 1e-6
    for key, allowed in {"eval_elbo": 1e-6, "eval_elbo_stderr": stderr}.items():
        assert many[0][key] == pytest.approx(one[0][key], rel=allowed)
        assert many[1][key] == pytest.approx(one[1][key], rel=1e-5)


def test_the_runs_compared_do_learn(trained):
    """A curve that stands still would agree with anything."""
    for variant in VARIANTS:
        evaluations = trained["one", variant][0].evaluations
        assert evaluations[-1]["eval_elbo"] < evaluations[0]["eval_elbo"] - 0.02, variant


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_on_two_ranks_stays_close_to_bf16_in_one_process(trained, layout):
    one, many = trained["one", "bf16"][0], trained[layout, "bf16"][0]
    for key in ("loss", "elbo", "grad_norm"):
        difference = largest_relative_difference(many.curve(key), one.curve(key))
        assert difference <= BF16_LAYOUTS[layout] * (10 if key == "grad_norm" else 1), (key, difference)
