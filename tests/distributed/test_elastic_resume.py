"""Eight ranks, taken up by any other number of ranks in any other layout and then by the eight again: the same run.

Same samples, same noise bits, the loss to a millionth in float32.
"""

from __future__ import annotations

import shutil

import pytest

from tests.support.ranks import on_ranks
from tests.support.runs import MODERN_BLOCK, largest_relative_difference, merged_sequences, toy_config, train_until

pytestmark = pytest.mark.timeout(900)

HOME = {"parallel__tensor": 2, "parallel__pipeline": 2}
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
LEFT, BACK, STEPS = 3, 6, 9


def _train(corpus, output, ranks, layout, until, block):
    config = toy_config(
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
    found = on_ranks(ranks, train_until, config, ranks, until, timeout_s=600)
    assert (config.folder / "LATEST").read_text() == f"step_{until:08d}\n"
    return {line["step"]: line for line in found[0].lines}, merged_sequences(found)


@pytest.fixture(scope="module")
def whole(toy_corpus, tmp_path_factory):
    """`{block: (folder, lines, sequences)}` of eight ranks that were left alone."""
    found = {}
    for block in BLOCKS:
        folder = tmp_path_factory.mktemp("whole")
        found[block] = (folder, *_train(toy_corpus, folder, 8, HOME, STEPS, block))
    return found


@pytest.mark.parametrize(("block", "layout"), CASES)
def test_there_and_back_is_the_same_run(whole, toy_corpus, tmp_path, block, layout):
    folder, wanted, wanted_sequences = whole[block]
    ranks, changes = AWAY[layout]
    shutil.copytree(folder / "toy", tmp_path / "toy")
    for path in (tmp_path / "toy/checkpoints").iterdir():
        if path.name != f"step_{LEFT:08d}":
            shutil.rmtree(path)
    (tmp_path / "toy/LATEST").unlink()
    away, sequences_away = _train(toy_corpus, tmp_path, ranks, changes, BACK, block)
    lines, sequences_back = _train(toy_corpus, tmp_path, 8, HOME, STEPS, block)
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
