"""Eight ranks, taken up by any other number of ranks in any other layout and then by the eight again: the same run.

Same samples, same noise bits, the loss to a millionth in float32. Each resume is followed by two steps: a wrong moment
or a wrong step of Adam shows in the loss of the second one.
"""

from __future__ import annotations

import shutil

import pytest

from tests.support.ranks import on_ranks
from tests.support.runs import (
    MODERN_BLOCK,
    largest_relative_difference,
    merged_sequences,
    toy_config,
    train_all,
    train_until,
)

pytestmark = pytest.mark.timeout(900)

HOME = (8, {"parallel__tensor": 2, "parallel__pipeline": 2})
AWAY = {
    "tp4": (4, {"parallel__tensor": 4}),
    "tp4_sequence_dp2": (8, {"parallel__tensor": 4, "parallel__sequence": True}),
    "pp4": (4, {"parallel__pipeline": 4}),
    "dp8": (8, {"batch__micro_batch_size": 1}),
    "one": (1, {"batch__micro_batch_size": 8}),
}
BLOCKS = {"plain": {}, "modern": {**MODERN_BLOCK, "heads": 8, "kv_heads": 4}}
CASES = [
    *(("plain", layout) for layout in AWAY),
    *(("modern", layout) for layout in ("tp4_sequence_dp2", "pp4", "one")),
]
LEFT, BACK, STEPS = 2, 4, 6


def _train_all_until(configs, world_size, until):
    return [train_until(config, world_size, until) for config in configs]


@pytest.fixture(scope="module")
def runs(toy_corpus, tmp_path_factory):
    """`{(block, which): (lines by step, sequences)}`, which is `whole`, or a layout and `away` or `back`.

    Each number of ranks is started once for all its runs of a kind.
    """
    root = tmp_path_factory.mktemp("elastic")
    found = {}

    def train(which, jobs, train, *args, **kwargs):
        """Run `jobs`, `{case: (ranks, layout)}`, each in the case's own folder."""
        for ranks in sorted({ranks for ranks, _ in jobs.values()}):
            cases = {case: layout for case, (count, layout) in jobs.items() if count == ranks}
            configs = [_config(toy_corpus, root / "-".join(case), case[0], layout) for case, layout in cases.items()]
            results = on_ranks(ranks, train, configs, ranks, *args, timeout_s=800, **kwargs)
            for place, case in enumerate(cases):
                trained = [rank[place] for rank in results]
                found[(*case, which)] = {line["step"]: line for line in trained[0].lines}, merged_sequences(trained)

    train("whole", {(block,): HOME for block in BLOCKS}, _train_all_until, STEPS)
    for block, layout in CASES:
        _copy_as_left(root / block / "toy", root / f"{block}-{layout}" / "toy")
    train("away", {case: AWAY[case[1]] for case in CASES}, _train_all_until, BACK)
    for block, layout in CASES:
        assert (root / f"{block}-{layout}" / "toy/LATEST").read_text() == f"step_{BACK:08d}\n"
    train("back", dict.fromkeys(CASES, HOME), train_all)
    return found


def _config(corpus, output, block, layout):
    return toy_config(
        corpus,
        output,
        schedule__steps=STEPS,
        schedule__decay_steps=0.3,
        checkpoint__every=LEFT,
        checkpoint__keep=0,
        data__valid=[],
        parallel__distributed_optimizer=True,
        **layout,
        **{f"model__{key}": value for key, value in BLOCKS[block].items()},
    )


def _copy_as_left(whole, folder):
    """Copy a run folder with nothing but its checkpoint of step `LEFT`."""
    others = [path.name for path in (whole / "checkpoints").iterdir() if path.name != f"step_{LEFT:08d}"]
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("LATEST", *others))


@pytest.mark.parametrize(("block", "layout"), CASES)
def test_there_and_back_is_the_same_run(runs, block, layout):
    wanted, wanted_sequences = runs[block, "whole"]
    away, sequences_away = runs[block, layout, "away"]
    lines, sequences_back = runs[block, layout, "back"]
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert {**sequences_away, **sequences_back} == {
        sample: digest for sample, digest in wanted_sequences.items() if sample >= LEFT * 8
    }
    steps = range(LEFT + 1, STEPS + 1)
    assert all(lines[step] == away[step] for step in range(LEFT + 1, BACK + 1))
    difference = {
        key: largest_relative_difference([lines[step][key] for step in steps], [wanted[step][key] for step in steps])
        for key in ("loss", "elbo", "grad_norm")
    }
    print(layout, difference)
    assert difference["loss"] <= 1e-6
    assert difference["elbo"] <= 1e-6
    assert difference["grad_norm"] <= 1e-5
