"""Counts of training FLOPs: the released tables, and one definition for laws, runs and the cost of a model."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megadiff.model import cost
from megadiff.scaling.flops import FLOP_COUNTS, flops_per_token, paper_params

PAPER = {"qk_norm": "full", "sink": True, "mlp_bias": True}
SIZES = [
    (8, 512, 25_223_680, "2.5201e+08"),
    (10, 640, 49_242_240, "4.5274e+08"),
    (12, 768, 85_064_448, "7.3688e+08"),
    (16, 1024, 201_556_992, "1.6120e+09"),
    (20, 1536, 566_662_656, "4.1550e+09"),
    (18, 3072, 2_039_208_960, "1.3594e+10"),
    (19, 3072, 2_152_498_176, "1.4349e+10"),
    (34, 4608, 8_665_532_928, "5.5844e+10"),
]


@pytest.mark.parametrize(("layers", "hidden", "params", "flops"), SIZES)
def test_parameters_and_flops_are_those_of_the_papers_table(layers, hidden, params, flops):
    assert paper_params(layers, hidden) == params
    assert f"{flops_per_token(layers, hidden, 2048):.4e}" == flops


def test_both_published_counts_equal_the_released_files():
    assert flops_per_token(20, 1536, 2048, method="deepseek") == 4_154_950_656
    assert flops_per_token(20, 1536, 2048, method="chinchilla") == 3_399_975_936


def test_the_head_is_what_full_adds():
    full = flops_per_token(20, 1536, 2048, method="full", vocab_size=131_072)
    assert full == 4_154_950_656 + 6 * 131_072 * 1536


@pytest.mark.parametrize("count", FLOP_COUNTS)
@pytest.mark.parametrize(("layers", "hidden", "params", "_"), SIZES)
def test_the_cost_of_a_model_agrees(layers, hidden, params, _, count):
    shape = cost.Shape(layers, hidden, hidden // 64, vocab_size=131_072, seq_length=2048, **PAPER)
    assert cost.flops_per_token(shape, count) == flops_per_token(layers, hidden, 2048, method=count, vocab_size=131_072)


def test_utilisation_leaves_out_norms_and_biases_alone():
    shape = cost.Shape(16, 1024, 16, vocab_size=131_072, seq_length=2048, **PAPER)
    apart = cost.flops_per_token(shape, "full") - cost.matrix_flops_per_token(shape)
    assert apart == 6 * (14 * 16 * 1024 + 1024)


def test_a_count_that_is_not_known_or_lacks_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="'kaplan' is no count of FLOPs; there are deepseek, chinchilla, full"):
        flops_per_token(2, 64, 64, method="kaplan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs vocab_size"):
        flops_per_token(2, 64, 64, method="full")


def test_laws_and_counts_load_neither_torch_nor_megatron():
    code = (
        "import sys, megadiff.scaling.flops, megadiff.scaling.laws;"
        "print(*{'torch', 'megatron', 'scipy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
