"""Fine-tuning on conversations: one curve on every layout and after a resume, and a model that learns to answer."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megadiff.data.conversations import ConversationOptions
from megadiff.data.documents import Corpus
from megadiff.data.preprocess import DocumentMarkers, preprocess
from megadiff.run.load_model import load_model
from megadiff.testing.methods import train_both
from megadiff.testing.toy_run import SAVED, STEPS, figures, toy_config, wire_on_rank
from tests.support.ranks import on_ranks
from tests.support.runs import GIDD_BLOCK

TOLERANCE = 5e-5
LAYOUTS = {
    "one rank": (1, {}),
    "tensor and data parallel": (4, {"parallel__tensor": 2, "parallel__sequence": True}),
    "pipeline parallel": (2, {"parallel__pipeline": 2}),
}
PACKED = {"data__padding": "eos", "data__packing": True, "model__seq_length": 20}
RUNS = {
    "masked": {"noise__shift": "masked", "data__padding": "predicted_eos"},
    "mixed noise, prompts and empty tokens": {
        "noise__shift": "balanced",
        "data__padding": "pad",
        "conditioning": {"prompt": 0.2, "infilling": 0.2, "pad_insertion": 0.2, "prompt_attention": "causal"},
    },
    "next token": {"method__name": "next_token", "data__padding": "eos"},
    "packed, with empty tokens": {
        **PACKED,
        "noise__shift": "balanced",
        "model__alignment": "shifted",
        "conditioning": {"infilling": 0.2, "pad_insertion": 0.2},
    },
    "packed, next token, recomputed": {**PACKED, "method__name": "next_token", "parallel__recompute": "full"},
    "packed, gidd's block": {
        **PACKED,
        **{f"model__{key}": value for key, value in GIDD_BLOCK.items()},
        "noise__shift": "masked",
        "parallel__recompute": "selective",
        "parallel__recompute_modules": ["core_attn", "layernorm", "mlp"],
    },
}


def write_sums(prefix, operands: Sequence[tuple[int, ...]]) -> None:
    """Write sums as indexed conversations of the byte tokenizer, such as `1+2+3=` and `6`."""
    path = prefix.with_suffix(".jsonl")
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{'+'.join(map(str, numbers))}=", "completion": str(sum(numbers))}) + "\n"
            for numbers in operands
        )
    )
    options = ConversationOptions(prompt_key="prompt", completion_key="completion")
    framing = DocumentMarkers(append_eod=True, conversations=options)
    preprocess(Corpus([path], fields=options.fields), prefix, "byte", framing=framing)


def sums(*, held_out: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the sums of three numbers from 0 to 4 to train on, and those that are held out."""
    every = list(itertools.product(range(5), repeat=3))
    random.Random(1).shuffle(every)
    return every[held_out:], every[:held_out]


def _train_all(pairs):
    """Train on this rank from the beginning, and from the checkpoint in the middle, for each pair of runs."""
    for whole, resumed in pairs:
        train_both(whole, resumed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`{(name, layout): (figures, those of the resumed run)}`; each layout's ranks are started once for all runs."""
    folder = tmp_path_factory.mktemp("conversations")
    write_sums(folder / "sums", [(1, 2), (3,) * 12, *sums(held_out=100)[0], (1,) * 6])
    shared = {"schedule__steps": STEPS, "checkpoint__every": SAVED, "eval__every": SAVED, "model__layers": 2}
    found = {}
    for place, (layout, (world_size, own)) in enumerate(LAYOUTS.items()):
        pairs = {}
        for number, (name, settings) in enumerate(RUNS.items()):
            settings = {**shared, "model__seq_length": 12, **settings, **own}
            pairs[name] = tuple(
                toy_config(folder / "sums", folder / f"{place}-{number}", **settings, name=run)
                for run in ("whole", "resumed")
            )
        on_ranks(world_size, _train_all, list(pairs.values()))
        found |= {(name, layout): tuple(map(figures, pair)) for name, pair in pairs.items()}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RUNS)
def test_every_layout_and_a_resume_give_one_curve(trained, name, layout):
    found, resumed = trained[name, layout]
    wanted, _ = trained[name, "one rank"]
    assert found == resumed
    assert [line["step"] for line in found if "loss" in line] == list(range(1, STEPS + 1))
    for one, other in zip(found, wanted, strict=True):
        assert one.get("noisy_tokens") == other.get("noisy_tokens")
        assert one.get("flops") == other.get("flops")
        for key in {"loss", "elbo", "grad_norm", "eval_elbo"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=TOLERANCE, abs=TOLERANCE), (one["step"], key)


def _train(config):
    wire_on_rank(config, dist.get_world_size()).train()


def _answers(folder, operands):
    """Return the numbers that a trained model answers, as text."""
    with load_model(folder, platform="cpu") as model:
        tokenizer, sampler = model.tokenizer, model.sampler()
        prompts = np.array([tokenizer.encode(f"{'+'.join(map(str, numbers))}=") for numbers in operands])
        settings = sampler.settings(3, max_denoising_steps=3, temperature=0.0)
        drawn = sampler.generate(model.denoise, torch.from_numpy(prompts), settings, seed=1).sequences[:, 6:].tolist()
    return [tokenizer.decode(ids[: ids.index(1)] if 1 in ids else ids) for ids in drawn]


def test_a_model_learns_to_answer(tmp_path):
    """Exact answers to sums that training never saw: 15 % would be right if every answer were the most frequent one."""
    train, held_out = sums(held_out=20)
    write_sums(tmp_path / "sums", train)
    config = toy_config(
        tmp_path / "sums",
        tmp_path,
        model={"layers": 1, "hidden": 64, "heads": 4, "seq_length": 9},
        noise__shift="masked",
        data__padding="predicted_eos",
        data__valid=[],
        batch={"global_batch_size": 32, "micro_batch_size": 32},
        optimizer__lr=5e-3,
        optimizer__weight_decay=1.0,
        schedule={"steps": 600, "warmup_steps": 20, "decay_steps": 0.3},
        log__every=100,
    )
    on_ranks(1, _train, config)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        found = pool.submit(_answers, config.folder, held_out).result()
    right = [answer == str(sum(numbers)) for answer, numbers in zip(found, held_out, strict=True)]
    assert sum(right) >= 15, list(zip(held_out, found, strict=True))
