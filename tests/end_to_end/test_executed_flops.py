"""The executed FLOPs of a training line against a counter of the matrix products that a real step calls."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megadiff.platform.quiet import quiet
from megadiff.run.summary import executed_flops
from tests.support.ranks import on_ranks
from tests.support.runs import MODERN_BLOCK, toy_config, wire_on_rank

with quiet():
    from megadiff.parallel.step_metrics import work_of

MODEL = {"layers": 2, "hidden": 32, "heads": 4, "seq_length": 16, "head_init": 0.02, "vocab_multiple": 64}
MODERN = {f"model__{key}": value for key, value in MODERN_BLOCK.items()}
CASES: dict[str, dict[str, Any]] = {
    "every token has logits": {"noise__shift": "uniform"},
    "only masks have logits": {"noise__shift": "masked"},
    "the plain head makes them all": {"noise__shift": "masked", "objective__loss_kernel": "plain"},
    "prompts see themselves alone": {"noise__shift": "uniform", "conditioning__prompt": 0.7},
    "causal prompts": {
        "noise__shift": "uniform", "conditioning__prompt": 0.7, "conditioning__prompt_attention": "causal"
    },
    "next tokens": {"method__name": "next_token"},
    "blocks recomputed": {"noise__shift": "masked", "parallel__recompute": "full"},
    "one block recomputed": {
        "noise__shift": "uniform", "parallel__recompute": "full", "parallel__recompute_layers": 1
    },
    "MLPs recomputed": {"noise__shift": "uniform", "parallel__recompute": "selective"},
    "the modern block": {"noise__shift": "masked", **MODERN},
    "the modern block, MLPs recomputed": {"noise__shift": "masked", "parallel__recompute": "selective", **MODERN},
}  # fmt: skip


def _counted(configs: dict[str, Any]) -> dict[str, tuple[int, float, float, float]]:
    """Return for one step of each run the FLOPs of the matrix products that were called, the reported ones apart from
    attention's scores, and the scored pairs, as reported and counted one by one."""
    found = {}
    for name, config in configs.items():
        run = wire_on_rank(config, 1)
        sequences = [next(run.microbatches) for _ in range(run.microbatches_of(0))]
        with FlopCounterMode(display=False) as counter:
            total = run.step(sequences, 0.0).sums.tolist()
        run.close()
        work = work_of(total)
        said = executed_flops(config, config.shape(vocab_size=260))(**work._replace(pairs=0.0)._asdict())
        lengths = [length for part in sequences for length in part.prompt_length.tolist()]
        is_causal = config.method.name == "next_token" or config.conditioning.prompt_attention == "causal"
        pairs = sum(_seen(q, length, is_causal=is_causal) for length in lengths for q in range(16))
        found[name] = counter.get_total_flops(), said, work.pairs, pairs
    return found


def _seen(query: int, prompt: int, *, is_causal: bool) -> int:
    """Return how many of sixteen keys a query sees behind or in a prompt of this length."""
    if query >= prompt:
        return 16
    return query + 1 if is_causal else prompt


@pytest.fixture(scope="module")
def counted(toy_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flops")
    configs = {
        name: toy_config(toy_corpus, folder, name=f"run{i}", model=MODEL, data__valid=[], **changes)
        for i, (name, changes) in enumerate(CASES.items())
    }
    return on_ranks(1, _counted, configs)[0]


@pytest.mark.parametrize("name", CASES)
def test_executed_flops_are_those_of_the_products_that_were_called(counted, name):
    """The counter knows no attention kernel of the CPU, so scores are left out; it also sees a product of 96 FLOPs."""
    called, said, _, _ = counted[name]
    assert called == pytest.approx(said, abs=1000)


@pytest.mark.parametrize("name", CASES)
def test_scored_pairs_are_those_that_prompts_leave(counted, name):
    _, _, said, wanted = counted[name]
    assert said == wanted
    assert (said < 8 * 16 * 16) == (name in ("prompts see themselves alone", "next tokens", "causal prompts"))


def test_a_masked_run_executes_less_than_its_model_flops(counted):
    assert counted["only masks have logits"][1] < 0.9 * counted["every token has logits"][1]
    assert counted["the plain head makes them all"][1] == counted["every token has logits"][1]
