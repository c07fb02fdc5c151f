"""A record of what single parts of a run produce: first weights, data order, samples and likelihoods.

A run compared with itself on another layout or after a resume cannot notice that both sides changed. These figures were
written once, by `python -m tests.golden.test_parts`, and change only on purpose.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megadiff.data.config import DataConfig
from megadiff.data.open import open_data
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.diffusion.mixing import HybridMixing
from megadiff.eval.likelihood import BoundSettings, Item, bounds
from megadiff.model.initialisation import global_parameters
from megadiff.sampling.standalone import HybridNoise, Settings, generate
from tests.golden.test_frozen import same
from tests.support.ranks import on_ranks
from tests.support.runs import write_corpus
from tests.support.toy_model import build_on_rank, model_config

FILE = Path(__file__).with_name("parts.json")
VOCAB, MASK = 11, 3
SHIFTS = {"masked": -1000.0, "balanced": 0.0, "uniform": 1000.0}


def first_weights() -> dict[str, list[float]]:
    """Return the sum and the sum of squares of every first weight; two blocks of a matrix apart where it has two."""
    return on_ranks(1, _first_weights_on_rank)[0]


def _first_weights_on_rank() -> dict[str, list[float]]:
    model = model_config(layers=3, qk_norm="full", sink=True, mlp_bias=True, hidden=72, ffn_multiple=4)
    chunks, _ = build_on_rank(model, vocab_size=300, seed=5)
    found = {}
    for name, parameter in global_parameters(chunks[0]):
        whole = parameter.detach().double()
        parts = whole.split(256) if whole.dim() == 2 else [whole]
        found[name] = [float(value) for part in parts for value in (part.sum(), (part * part).sum())]
    return found


def data_order(folder: Path) -> dict[str, Any]:
    """Return hashes of the first 16 sequences of two sources blended 2:1, with the data's fingerprint."""
    write_corpus(folder / "a", tokens=3000, seed=1)
    write_corpus(folder / "b", tokens=1500, seed=2)
    data = DataConfig.model_validate(
        {
            "train": [{"path": str(folder / "a"), "weight": 2}, {"path": str(folder / "b"), "weight": 1}],
            "tokenizer": "byte",
        }
    )
    opened = open_data(data, ByteTokenizer(), seq_length=32, seed=7, valid_sequences=1)
    sequences = opened.train.sequences(list(range(16)))
    return {
        "fingerprint": opened.fingerprint,
        "sequences": [hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16] for ids in sequences],
    }


def order_by_size(folder: Path) -> dict[str, Any]:
    """Return the sources of the first 60 sequences where they share by size, and the fingerprint of such data."""
    for seed, name in enumerate(("large", "small"), start=3):
        write_corpus(folder / name, tokens=4000 // seed, seed=seed)
    data = DataConfig.model_validate({"train": [str(folder / "large"), str(folder / "small")], "tokenizer": "byte"})
    opened = open_data(data, ByteTokenizer(), seq_length=32, seed=7, valid_sequences=1)
    sequences = opened.train.sequences(list(range(60)))
    return {
        "fingerprint": opened.fingerprint,
        "sequences": [hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:4] for ids in sequences],
    }


def table(ids: torch.Tensor) -> torch.Tensor:
    """Return logits [B, L, V] that depend on the token, its neighbour and the position, by a plain formula."""
    position = torch.arange(ids.shape[1])[None, :, None]
    entry = torch.arange(VOCAB)[None, None, :]
    left = torch.roll(ids, 1, dims=1)[..., None]
    return torch.sin(1.0 + 0.7 * entry * (ids[..., None] + 1) + 0.3 * position + 0.9 * left).double() * 2


def samples() -> dict[str, list[list[int]]]:
    """Return ids drawn by each sampler under each kind of noise."""
    prompt = torch.tensor([[4, 5], [6, 7]])
    ways = {
        "ancestral": {"sampler": "ancestral"},
        "adaptive": {"sampler": "adaptive"},
        "blocks": {"sampler": "ancestral", "block_length": 4, "temperature": 0.7, "top_k": 5},
    }
    found = {}
    for noise, shift in SHIFTS.items():
        for way, options in ways.items():
            settings = Settings(max_new_tokens=10, max_denoising_steps=8, **options)
            drawn = generate(lambda ids, *_: table(ids), prompt, settings, HybridNoise(VOCAB, MASK, shift), seed=[1, 2])
            found[f"{noise} {way}"] = drawn.sequences.tolist()
    return found


def guided_samples() -> dict[str, list[list[int]]]:
    """Return ids drawn with guidance, whose second, unconditional pass begins with noise of its own."""
    prompt, found = torch.tensor([[4, 5], [6, 7]]), {}
    for noise, shift in SHIFTS.items():
        settings = Settings(max_new_tokens=10, max_denoising_steps=8, guidance_scale=3.0)
        drawn = generate(lambda ids, *_: table(ids), prompt, settings, HybridNoise(VOCAB, MASK, shift), seed=[1, 2])
        found[noise] = drawn.sequences.tolist()
    return found


def likelihoods() -> dict[str, list[float]]:
    """Return one estimate of each estimator under each kind of noise."""
    items = [Item((4, 5), (6, 7, 8, 1, 0)), Item((), (9, 10, 2))]
    found = {}
    for noise, shift in SHIFTS.items():
        for estimator in ("counts", "levels"):
            settings = BoundSettings(draws=8, estimator=estimator, seed=3)
            process = HybridMixing(VOCAB, MASK, shift)
            result = bounds(items, lambda ids, _: table(ids), process=process, settings=settings)
            found[f"{noise} {estimator}"] = [value for one in result for value in (one.nll, one.stderr)]
    return found


def likelihoods_in_context() -> dict[str, list[float]]:
    """Return estimates with the context filled with noise, and of texts with fewer sets of tokens than copies."""
    found = {}
    for noise, shift in SHIFTS.items():
        process = HybridMixing(VOCAB, MASK, shift)
        for what, draws, length in (("filled", 8, 12), ("short", 64, None)):
            items = [Item((4, 5), (6, 7, 8)), Item((), (9, 10, 2))]
            settings = BoundSettings(draws=draws, seed=3, context_length=length)
            result = bounds(items, lambda ids, _: table(ids), process=process, settings=settings)
            found[f"{noise} {what}"] = [value for one in result for value in (one.nll, one.stderr)]
    return found


def observed(folder: Path) -> dict[str, Any]:
    """Return every record."""
    return {
        "data_order": data_order(folder),
        "first_weights": first_weights(),
        "guided_samples": guided_samples(),
        "likelihoods": likelihoods(),
        "likelihoods_in_context": likelihoods_in_context(),
        "order_by_size": order_by_size(folder),
        "samples": samples(),
    }


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return observed(tmp_path_factory.mktemp("parts"))


RECORDED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}


@pytest.mark.parametrize("part", sorted(RECORDED))
def test_a_part_produces_what_was_recorded(now: dict[str, Any], part: str) -> None:
    assert same(now[part], RECORDED[part], part) == []


def test_blocks_of_a_matrix_are_drawn_apart() -> None:
    blocks = RECORDED["first_weights"]["decoder.layers.0.mlp.linear_fc1.weight"]
    assert len(blocks) == 4
    assert blocks[0] != blocks[2]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FILE.write_text(json.dumps(observed(Path(name)), indent=1, sort_keys=True) + "\n")
