"""A run on packed conversations and text together: its evaluation and its replay afterwards, and what they count."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch.distributed as dist

from megadiff.run.load_model import load_model
from megadiff.testing.toy_run import figures, toy_config, wire_on_rank, write_corpus
from tests.distributed.test_conversations import sums, write_sums
from tests.support.ranks import on_ranks


def _train(config):
    wire_on_rank(config, dist.get_world_size()).train()


def _again(folder, data, step):
    """Return the bound on the data, the replayed figures of a step, and the documents of its batch."""
    from megadiff.run.replay import replay

    with load_model(folder, platform="cpu") as model:
        found = model.held_out_elbo(str(data), sequences=7, num_noise_levels=2, micro_batch_size=2)
    replayed = replay(folder, step)
    return found.elbo, replayed.figures, replayed.batch.documents.numpy()


@pytest.mark.parametrize("method", ["gidd", "next_token"])
def test_evaluation_and_replay_give_the_figures_of_the_run(method, tmp_path):
    write_sums(tmp_path / "sums", [(1, 2), (3,) * 12, *sums(held_out=100)[0]])
    write_corpus(tmp_path / "text", tokens=400)
    config = toy_config(
        tmp_path / "sums",
        tmp_path,
        data__train=[str(tmp_path / "sums"), str(tmp_path / "text")],
        method__name=method,
        data__padding="pad",
        data__packing=True,
        model={"layers": 2, "hidden": 32, "heads": 4, "seq_length": 24, "head_init": 0.02},
        schedule={"steps": 4, "warmup_steps": 1, "decay_steps": 0},
        eval__every=2,
    )
    on_ranks(1, _train, config)
    lines = {(line["step"], "loss" in line): line for line in figures(config)}
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        elbo, replayed, documents = pool.submit(_again, config.folder, tmp_path / "sums", 3).result()
    assert elbo == pytest.approx(lines[4, False]["eval_elbo"], rel=1e-6)
    for key in ("loss", "elbo", "grad_norm"):
        assert replayed[key] == pytest.approx(lines[3, True][key], rel=1e-6)
    several = documents.max(axis=1)
    assert several.min() == 0 < 2 <= several.max()  # text, and conversations
