"""The dry run: equal to real ranks byte by byte, and to the closed form on layouts of a thousand ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from megadiff.run.dry_run import saved_bytes
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
    "muon, sharded": (
        8,
        {
            "parallel__tensor": 2,
            "parallel__distributed_optimizer": True,
            "precision__compute": "bf16",
            "optimizer__name": "muon",
        },
    ),
    "muon": (2, {"parallel__pipeline": 2, "optimizer__name": "muon"}),
}


def _dry_run(path: Path, ranks: int, *words: str) -> Ended:
    return call_forked("tools/dry_run.py", "--config", path, "--ranks", str(ranks), *words)


def _each_rank(ranks: int) -> list[str]:
    return [word for rank in range(ranks) for word in ("--rank", str(rank))]


def _measured(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return what this real rank holds after a step, and the bytes that one microbatch saves."""
    run = wire_on_rank(config, world_size)
    traffic = _watched_step(run)
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
    return {**counted, "activations_per_microbatch": saved, "stage": topology.stage, "update": traffic}


def _watched_step(run: Any) -> dict[str, int]:
    """Take a step and return the bytes that its update sent, and its collectives between tensor ranks."""
    import torch.distributed as dist

    from megadiff.optim import muon

    found = {"data_bytes": 0, "tensor_calls": 0, "tensor_bytes": 0}
    received = 0
    exchange, summed = dist.batch_isend_irecv, muon._summed

    def exchanged(messages: list[Any]) -> Any:
        nonlocal received
        for message in messages:
            found["data_bytes"] += message.tensor.nbytes * (message.op is dist.isend)
            received += message.tensor.nbytes * (message.op is dist.irecv)
        return exchange(messages)

    def counted_sum(values: torch.Tensor, group: Any) -> torch.Tensor:
        if group is not None:
            found["tensor_calls"] += 1
            found["tensor_bytes"] += values.nbytes
        return summed(values, group)

    dist.batch_isend_irecv, muon._summed = exchanged, counted_sum
    try:
        run.step([next(run.microbatches) for _ in range(run.microbatches_of(0))], 1e-3)
    finally:
        dist.batch_isend_irecv, muon._summed = exchange, summed
    assert received == found["data_bytes"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_counts_what_real_ranks_hold_to_the_byte(toy_corpus: Path, tmp_path: Path, layout: str) -> None:
    ranks, changes = LAYOUTS[layout]
    tree = toy_tree(toy_corpus, tmp_path, schedule__steps=4, batch__micro_batch_size=2, data__valid=[], **changes)
    real = on_ranks(ranks, _measured, RunConfig.model_validate(tree), ranks)
    out = tmp_path / "found.json"
    chosen = ["--all-stages"] if tree["parallel"].get("pipeline", 1) > 1 else _each_rank(ranks)
    ended = _dry_run(write_yaml(tmp_path / "run.yaml", tree), ranks, *chosen, "--output", str(out))
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())["ranks"]
    assert {rank["stage"] for rank in found} == set(range(tree["parallel"].get("pipeline", 1)))
    for rank in found:
        built, wanted = rank["built"], real[rank["rank"]]
        assert rank["stage"] == wanted["stage"]
        for name in ("parameters", "gradients", "optimizer", "activations_per_microbatch"):
            assert built[name] == wanted[name], (rank["rank"], name)
        for name, counted in wanted["update"].items() if "muon" in layout else ():
            assert rank["update"][name] == counted, (rank["rank"], name)
    if layout == "muon, sharded":
        assert sum(rank["update"]["data_bytes"] for rank in found) > 0
        assert sum(rank["update"]["matrices"] for rank in found) >= 2 * sum(rank["update"]["owned"] for rank in found)
        assert "collectives of tensor ranks" in ended.out


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
    assert (three["tensor_group"], three["data_group"], three["pipeline_group"]) == ([2, 3], [1, 3], [3, 7])
    assert "pipeline group  ranks 3 to 7 by 4" in ended.out


BLOCK = 2 * 16 * 32 * 4
"""Bytes of a toy microbatch's hidden states in float32."""


@pytest.mark.parametrize("sequence", [False, True])
def test_communication_is_that_of_the_blocks(toy_corpus: Path, tmp_path: Path, sequence: bool) -> None:
    """Whole states: an all-reduce behind each of two branches, each way, and one for either vocabulary table.

    Split states (Korthikanti et al., arXiv:2205.05198, section 4.2): an all-gather before and a reduce-scatter behind
    each branch, each way, and the branch's input gathered once more for the gradient of its weights; beside them one
    each way for the embedding and for the head.
    """
    tree = toy_tree(
        toy_corpus,
        tmp_path,
        parallel={"tensor": 2, "sequence": sequence, "distributed_optimizer": True},
        model__qk_norm="none",
    )
    out = tmp_path / "found.json"
    ended = _dry_run(write_yaml(tmp_path / "run.yaml", tree), 4, "--output", str(out))
    assert ended.code == 0, ended.err
    (rank,) = json.loads(out.read_text())["ranks"]
    layers = tree["model"]["layers"]
    calls = 10 * layers + 4 if sequence else 4 * layers + 2
    assert (rank["tensor_calls"], rank["tensor_bytes"]) == (calls, calls * BLOCK)
    assert rank["data_bytes"] == rank["built"]["gradients"] + rank["built"]["parameters"]
    assert rank["tokens"] == ([0, 7] if sequence else [0, 15])
    microbatches = 4 // 2
    assert f"in {calls * microbatches} collectives" in ended.out


def test_a_rampup_starts_with_fewer_microbatches(toy_corpus: Path, tmp_path: Path) -> None:
    rampup = {"start": 4, "increment": 2, "every_steps": 2}
    tree = toy_tree(toy_corpus, tmp_path, batch__rampup=rampup)
    out = tmp_path / "found.json"
    ended = _dry_run(write_yaml(tmp_path / "run.yaml", tree), 1, "--output", str(out))
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert found["ranks"][0]["samples"] == [[0, 1], [2, 3]]
    assert (found["first_batch"], found["layout"]["num_microbatches"]) == (2, 4)
    assert "4 microbatch(es) a step, 2 in step 1" in ended.out


def test_what_was_configured_and_not_built_is_named(toy_corpus: Path, tmp_path: Path) -> None:
    tree = toy_tree(toy_corpus, tmp_path, precision={"compute": "bf16", "fp8": "delayed"}, platform="cuda")
    tree["model"].update(hidden=64, ffn_multiple=4)
    tree["batch"].update(micro_batch_size=1)
    out = tmp_path / "found.json"
    ended = _dry_run(write_yaml(tmp_path / "run.yaml", tree), 1, "--output", str(out))
    assert ended.code == 0, ended.err
    (rank,) = json.loads(out.read_text())["ranks"]
    copies = 2 * tree["model"]["layers"] * 12 * 64**2
    assert rank["configured"]["parameters"] == rank["estimated"]["parameters"] + copies
    assert rank["built"]["total"] == sum(
        rank["built"][name] for name in ("parameters", "gradients", "optimizer", "activations", "logits")
    )
    assert rank["needed"] == rank["built"]["total"] + rank["configured"]["total"] - rank["estimated"]["total"]
    assert rank["needed"] != rank["built"]["total"]
    assert "by the closed form (FP8 copies of the weights, Transformer Engine's layers)" in ended.out
    assert "not built         Transformer Engine's layers: its Python package is not there (`pip install" in ended.out


SELECTIVE = {"parallel__recompute": "selective", "parallel__recompute_modules": ["mlp", "layernorm"]}
INTERLEAVED = {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}
SINGLE: dict[str, tuple[int, dict[str, Any]]] = {
    "selective": (1, SELECTIVE),
    "full": (1, {"parallel__recompute": "full"}),
    "softcap": (1, {"model__softcap": 30.0}),
    "no master weights": (
        1,
        {"precision__master_weights": False, "optimizer__name": "laprop", "optimizer__clip_grad": 0},
    ),
    "attention recomputed": (
        1,
        {"parallel__recompute": "selective", "parallel__recompute_modules": ["core_attn"], "model__sink": True},
    ),
    "muon": (1, {"optimizer__name": "muon"}),
    "interleaved": (2, INTERLEAVED),
    "interleaved, selective": (2, {**INTERLEAVED, **SELECTIVE}),
    "interleaved, full": (2, {**INTERLEAVED, "parallel__recompute": "full"}),
    "interleaved, full for some": (
        2,
        {**INTERLEAVED, "parallel__recompute": "full", "parallel__recompute_layers": 1, "model__layers": 8},
    ),
    "stages in full, sequence": (
        4,
        {
            "parallel__pipeline": 2,
            "parallel__tensor": 2,
            "parallel__sequence": True,
            "parallel__recompute": "full",
            **GIDD,
        },
    ),
}


@pytest.mark.parametrize("setting", SINGLE)
def test_the_closed_form_agrees_on_single_settings(toy_corpus: Path, tmp_path: Path, setting: str) -> None:
    size = {"model__hidden": 256, "model__seq_length": 128, "batch__micro_batch_size": 1}
    ranks, changes = SINGLE[setting]
    tree = toy_tree(toy_corpus, tmp_path, precision__compute="bf16", **{**size, **changes})
    out = tmp_path / "found.json"
    file = write_yaml(tmp_path / "run.yaml", tree)
    ended = _dry_run(file, ranks, *(["--all-stages"] if ranks > 1 else []), "--output", str(out))
    assert ended.code == 0, ended.err
    parts = {"parameters": 0.005, "gradients": 0.005, "optimizer": 0.005, "activations": 0.1, "total": 0.1}
    for rank in json.loads(out.read_text())["ranks"]:
        for name, tolerance in parts.items():
            assert rank["built"][name] == pytest.approx(rank["estimated"][name], rel=tolerance), name


def _refuse_to_compile() -> None:
    import megatron.core.tensor_parallel.random as random

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a dry run compiles nothing")

    random.load_inline = refuse  # type: ignore[attr-defined]  megatron-core 0.19 has it


def test_recomputed_norms_compile_no_extension(toy_corpus: Path, tmp_path: Path) -> None:
    """A dry run that is given up while it compiles would leave a lock for which training waits."""
    file = write_yaml(tmp_path / "run.yaml", toy_tree(toy_corpus, tmp_path, **SELECTIVE))
    ended = call_forked("tools/dry_run.py", "--config", file, "--ranks", "1", before=_refuse_to_compile)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize(
    ("ranks", "words", "sentence"),
    [
        (4, ("--rank", "8"), "there is no rank 8 among 4; give --rank a number below 4"),
        (0, (), "--ranks must be at least 1, got 0"),
        (4, ("--rank", "0", "--all-stages"), "--rank and --all-stages exclude each other"),
        (6, ("parallel.tensor=4",), "the run has 6 rank(s), but parallel.tensor=4 x parallel.pipeline=1 needs"),
        (4, ("data.tokenizer=nowhere",), "data.tokenizer: "),
        (4, ("data.vocab_size=300",), "data.vocab_size is 300, but the tokenizer"),
        (4, ("data.tokenizer=README.md", "data.vocab_size=300"), "data.tokenizer: "),
        (4, ("precision.compile=true", "parallel.tensor=2"), "precision.compile does not work with parallel.tensor=2"),
    ],
)
def test_a_mistake_is_one_sentence(
    toy_corpus: Path, tmp_path: Path, ranks: int, words: tuple[str, ...], sentence: str
) -> None:
    ended = _dry_run(write_yaml(tmp_path / "run.yaml", toy_tree(toy_corpus, tmp_path)), ranks, *words)
    assert ended.code == 2
    assert sentence in ended.err
    assert len(ended.err.splitlines()) == 1
