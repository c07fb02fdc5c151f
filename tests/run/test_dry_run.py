"""The dry run: equal to real ranks byte by byte, and to the closed form on layouts of a thousand ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.model.saved_tensors import saved_bytes
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from tests.support.commands import REPOSITORY, write_yaml
from tests.support.forked_command import Ended, call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK, toy_tree, wire_on_rank

with quiet():
    import megadiff.run.dry_run  # noqa: F401  before the fork

GIDD = {f"model__{key}": value for key, value in GIDD_BLOCK.items() if key != "softcap"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sharded": (
        8,
        {
            "parallel__tensor": 2,
            "parallel__pipeline": 2,
            "parallel__sequence": True,
            "parallel__distributed_optimizer": True,
            "precision__compute": "bf16",
            **GIDD,
        },
    ),
    "interleaved": (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "optimizer__name": "laprop"}),
    "whole states": (2, {"parallel__tensor": 2, "precision__compute": "bf16"}),
}


def _dry_run(path: Path, ranks: int, *words: str) -> Ended:
    return call_forked("tools/dry_run.py", "--config", path, "--ranks", str(ranks), *words)


def _measured(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return what this real rank holds after a step, and the bytes that one microbatch saves."""
    run = wire_on_rank(config, world_size)
    run.step([next(run.microbatches) for _ in range(run.microbatches_of(0))], 1e-3)
    wrapped = run.step.optimizer._wrapped
    parameters = [p for chunk in run.step.chunks for p in chunk.parameters()]
    buffers = [buffer.grad_data for chunk in run.step.chunks for buffer in chunk.buffers]
    state = [value for held in wrapped.optimizer.state.values() for value in held.values()]
    if config.precision.compute == "bf16":  # the optimizer updates copies in float32
        state += [p for group in wrapped.optimizer.param_groups for p in group["params"]]
    saved, topology = 0, run.step.topology
    for index, chunk in enumerate(run.step.chunks):
        inner = getattr(chunk.module, "module", chunk.module)
        ids = torch.zeros(config.batch.micro_batch_size, config.model.seq_length, dtype=torch.int64)
        if not (topology.is_first_stage and index == 0):
            dtype = torch.bfloat16 if config.precision.compute == "bf16" else torch.float32
            length = config.model.seq_length // (config.parallel.tensor if config.parallel.sequence else 1)
            states = torch.randn(length, config.batch.micro_batch_size, config.model.hidden).to(dtype)
            inner.set_input_tensor(states.requires_grad_())
        there = [*chunk.parameters(), *inner.buffers(), *buffers, ids]
        saved += saved_bytes(
            lambda chunk=chunk, ids=ids: chunk(ids, None, loss_fn=lambda hidden, _: hidden), apart_from=there
        )
    size = {"parameters": parameters, "gradients": buffers, "optimizer": state}
    counted = {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in size.items()}
    return {**counted, "activations_per_microbatch": saved, "stage": topology.stage, "samples": topology.data_rank}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_counts_what_real_ranks_hold_to_the_byte(toy_corpus: Path, tmp_path: Path, layout: str) -> None:
    ranks, changes = LAYOUTS[layout]
    tree = toy_tree(toy_corpus, tmp_path, schedule__steps=4, batch__micro_batch_size=2, data__valid=[], **changes)
    real = on_ranks(ranks, _measured, RunConfig.model_validate(tree), ranks)
    out = tmp_path / "found.json"
    ended = _dry_run(write_yaml(tmp_path / "run.yaml", tree), ranks, "--all-stages", "--output", str(out))
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())["ranks"]
    assert {rank["stage"] for rank in found} == set(range(tree["parallel"].get("pipeline", 1)))
    for rank in found:
        built, wanted = rank["built"], real[rank["rank"]]
        assert rank["stage"] == wanted["stage"]
        for name in ("parameters", "gradients", "optimizer", "activations_per_microbatch"):
            assert built[name] == wanted[name], (rank["rank"], name)


THOUSAND: dict[str, tuple[str, ...]] = {
    "the paper's 10B": ("parallel.pipeline=2",),
    "tensor 8, pipeline 8": (
        *("model.layers=32", "model.hidden=4096", "model.heads=32", "parallel.tensor=8", "parallel.pipeline=8"),
        *("batch.micro_batch_size=1", "precision.compute=bf16"),
    ),
    "interleaved": (
        *("model.layers=32", "model.hidden=4096", "model.heads=32", "parallel.pipeline=4"),
        *("parallel.virtual_pipeline=2", "parallel.recompute=full"),
    ),
}


@pytest.mark.parametrize("layout", THOUSAND)
def test_the_closed_form_agrees_on_a_thousand_ranks(tmp_path: Path, layout: str) -> None:
    out = tmp_path / "found.json"
    preset = REPOSITORY / "examples/models/gidd-unif-10b.yaml"
    ended = _dry_run(preset, 1024, "--output", str(out), *THOUSAND[layout])
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert found["layout"]["tensor"] * found["layout"]["pipeline"] * found["layout"]["data"] == 1024
    for rank in found["ranks"]:
        for name in ("parameters", "gradients", "optimizer"):
            assert rank["built"][name] == pytest.approx(rank["estimated"][name], rel=0.005), name
        saved = rank["built"]["activations_per_microbatch"]
        assert saved == pytest.approx(rank["estimated"]["activations_per_microbatch"], rel=0.1)
    assert "rank 0 " in ended.out
    assert f"{found['bubble']:.1%} of a step" in ended.out


def test_ranges_of_sequences_and_vocabulary_are_those_of_the_rank(toy_corpus: Path, tmp_path: Path) -> None:
    tree = toy_tree(toy_corpus, tmp_path, parallel__tensor=2, parallel__pipeline=2)
    out = tmp_path / "found.json"
    words = ("--rank", "3", "--rank", "7", "--output", str(out))
    ended = _dry_run(write_yaml(tmp_path / "run.yaml", tree), 8, *words)
    assert ended.code == 0, ended.err
    three, seven = json.loads(out.read_text())["ranks"]
    assert (three["stage"], three["tensor_rank"], three["data_rank"]) == (0, 1, 1)
    assert (seven["stage"], seven["tensor_rank"], seven["data_rank"]) == (1, 1, 1)
    assert three["layers"] == [0, 1]
    assert seven["layers"] == [2, 3]
    assert three["vocabulary"] == seven["vocabulary"] == [192, 383]
    assert three["samples"] == [[2, 3], [6, 7]], "8 sequences a step, 2 at once, on two replicas"
    assert three["pipeline_bytes"] == seven["pipeline_bytes"] == 2 * 16 * 32 * 4
    assert "blocks 2 to 3" in ended.out


@pytest.mark.parametrize(
    ("ranks", "words", "sentence"),
    [
        (4, ("--rank", "8"), "there is no rank 8 among 4; give --rank a number below 4"),
        (0, (), "--ranks must be at least 1, got 0"),
        (4, ("--rank", "0", "--all-stages"), "--rank and --all-stages exclude each other"),
        (6, ("parallel.tensor=4",), "the run has 6 rank(s), but parallel.tensor=4 x parallel.pipeline=1 needs"),
        (4, ("data.tokenizer=nowhere",), "data.tokenizer: "),
    ],
)
def test_a_mistake_is_one_sentence(
    toy_corpus: Path, tmp_path: Path, ranks: int, words: tuple[str, ...], sentence: str
) -> None:
    ended = _dry_run(write_yaml(tmp_path / "run.yaml", toy_tree(toy_corpus, tmp_path)), ranks, *words)
    assert ended.code == 2
    assert sentence in ended.err
    assert len(ended.err.splitlines()) == 1
