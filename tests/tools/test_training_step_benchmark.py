"""The benchmark of a training step compares like with like, at a size at which it takes no time."""

from __future__ import annotations

import torch

from megadiff.platform.quiet import quiet
from tests.support.ranks import on_ranks

with quiet():
    from training_step import PlainTraining, Size, Wired, check_equal, measure

TINY = Size(2, 32, 2, seq_length=16, vocab_size=300, sequences=4, micro_batch_size=2)


def _measured(folder):
    return [measure(TINY, folder / kind, kind=kind, rounds=2) for kind in ("plain", "noise")]


def test_both_tables_are_measured(tmp_path, capfd):
    plain, noise = on_ranks(1, _measured, tmp_path)[0]
    assert list(plain) == ["megadiff", "plain"]
    assert list(noise) == ["masked", "balanced", "uniform", "next token"]
    assert plain["plain"] == noise["next token"] == 1.0
    assert all(ratio > 0 for ratio in (*plain.values(), *noise.values()))
    assert capfd.readouterr().out.count("CPU-s a step") == 6


def _other_model(folder):
    wired = Wired.open(TINY, folder / "other")
    plain = PlainTraining(TINY, wired.prepared, wired.run.step.chunks[0].module)
    with torch.no_grad():
        plain.model.blocks[1].q_norm.weight.mul_(1.1)
    try:
        check_equal(wired.side("next_token"), plain)
    except SystemExit as ending:
        return str(ending)
    finally:
        wired.close()
    return None


def test_two_sides_that_train_different_models_are_not_compared(tmp_path):
    assert on_ranks(1, _other_model, tmp_path)[0] == "the two sides do not train the same model: nothing was timed"


def _same_model(folder):
    wired = Wired.open(TINY, folder / "same")
    check_equal(wired.side("next_token"), PlainTraining(TINY, wired.prepared, wired.run.step.chunks[0].module), steps=6)
    wired.close()


def test_the_two_sides_take_the_same_steps(tmp_path, capfd):
    on_ranks(1, _same_model, tmp_path)
    assert capfd.readouterr().out.startswith("losses of 6 steps: ")
