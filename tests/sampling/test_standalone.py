"""Samplers against a distribution known exactly, their settings, ends, blocks, guidance and independence of batches."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megadiff.diffusion import philox
from megadiff.diffusion.mixing import HybridMixing
from megadiff.sampling.standalone import (
    CounterRNG,
    HybridNoise,
    Prediction,
    Settings,
    Step,
    adaptive_candidates,
    generate,
)
from tests.sampling.toy_joint import LENGTH, MASK, NOISES, REAL, VOCAB, ExactDenoiser, chi_square, leave_one_out

EMPTY = torch.empty(5000, 0, dtype=torch.int64)
TABLE = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
MIXINGS = {name: HybridMixing(9, 4, shift) for name, shift in NOISES.items()}


def bigram(ids: Tensor, _prefix: int = 0) -> Tensor:
    """Fixed logits [B, L, 9] that depend on the tokens around."""
    left = torch.nn.functional.pad(ids, (1, 0))[:, :-1]
    return TABLE[ids] + 2 * TABLE.T[left]


def toy_sequences(name: str, steps: int, **settings: Any) -> Tensor:
    process = HybridMixing(VOCAB, MASK, NOISES[name])
    exact = ExactDenoiser(process)
    chosen = Settings(max_new_tokens=LENGTH, max_denoising_steps=steps, reuse_logits=False, **settings)
    return generate(exact, EMPTY, chosen, process, seed=1, on_step=exact.on_step).sequences


@pytest.mark.parametrize("name", NOISES)
def test_ancestral_samples_approach_the_data_as_steps_grow(name):
    (coarse, p_coarse), (middle, _), (fine, p_fine) = (chi_square(toy_sequences(name, steps)) for steps in (2, 16, 160))
    assert coarse > middle > fine
    assert p_coarse < 1e-6
    assert p_fine > 1e-3, fine


def test_blocks_one_after_the_other_give_the_same_distribution():
    """Two blocks of two positions; the noise of the second is seen by the first and says nothing."""
    process = HybridMixing(VOCAB, MASK, NOISES["masked"])
    exact = ExactDenoiser(process)
    settings = Settings(max_new_tokens=4, block_length=2, max_denoising_steps=128)
    found = generate(exact, EMPTY, settings, process, seed=2, on_step=exact.on_step)
    assert chi_square(found.sequences)[1] > 1e-3


def test_adaptive_sampling_of_masked_noise_one_token_at_a_time_is_exact():
    """Which position comes next depends on revealed tokens alone, and each is drawn from its exact conditional."""
    assert chi_square(toy_sequences("masked", 4, sampler="adaptive"))[1] > 1e-3
    assert chi_square(toy_sequences("masked", 1, sampler="adaptive"))[1] < 1e-6  # all at once: independent, so wrong


@pytest.mark.parametrize("name", NOISES)
def test_adaptive_sampling_at_temperature_0_reaches_local_optima(name):
    process = HybridMixing(VOCAB, MASK, NOISES[name])
    exact = ExactDenoiser(process)
    settings = Settings(max_new_tokens=4, max_denoising_steps=40, sampler="adaptive", temperature=0, tokens_per_step=1)
    sequences = generate(exact, EMPTY[:50], settings, process, on_step=exact.on_step).sequences
    if name == "masked":  # never revises: greedy, the same for all
        assert len(sequences.unique(dim=0)) == 1
        return
    best = leave_one_out(sequences, 9.0, process).argmax(-1)
    assert float((best == sequences).all(dim=1).double().mean()) > 0.9


HARD = [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1}, {"top_p": 0.1, "top_k": 2, "temperature": 0.3}]


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("sampler", ["ancestral", "adaptive"])
@pytest.mark.parametrize("options", HARD, ids=str)
def test_truncation_gives_no_nan_no_mask_and_no_unknown_token(name, sampler, options):
    process = HybridMixing(VOCAB, MASK, NOISES[name])
    exact, sure = ExactDenoiser(process), []

    def watch(step: Step) -> None:
        exact.on_step(step)
        sure.append(step.confidence())

    settings = Settings(max_new_tokens=4, max_denoising_steps=7, sampler=sampler, **options)
    sequences = generate(exact, EMPTY[:200], settings, process, on_step=watch).sequences
    assert bool(torch.isin(sequences, REAL).all())
    assert all(bool(part.isfinite().all()) for part in sure)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("sampler", ["ancestral", "adaptive"])
@pytest.mark.parametrize("more", [{}, {"guidance_scale": 2.0}, {"block_length": 3, "see_tail": False}], ids=str)
def test_a_sequence_does_not_depend_on_its_batch(name, sampler, more):
    prompt = torch.tensor([[1, 2], [3, 0], [7, 8], [2, 2]])
    settings = Settings(max_new_tokens=10, max_denoising_steps=5, sampler=sampler, eos_token_id=1, **more)
    whole = generate(bigram, prompt, settings, MIXINGS[name], seed=9)
    order = torch.tensor([3, 1])
    part = generate(bigram, prompt[order], settings, MIXINGS[name], seed=9, sequences=order)
    assert torch.equal(part.sequences, whole.sequences[order])
    assert torch.equal(part.new_tokens, whole.new_tokens[order])
    # A seed of its own for each request: alone or together, in any order.
    seeds = [11, 12, 13, 14]
    mixed = generate(bigram, prompt, settings, MIXINGS[name], seed=seeds)
    for i, seed in enumerate(seeds):
        alone = generate(bigram, prompt[i : i + 1], settings, MIXINGS[name], seed=[seed])
        assert torch.equal(alone.sequences[0], mixed.sequences[i])
    assert not torch.equal(mixed.sequences, whole.sequences)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("sampler", ["ancestral", "adaptive"])
def test_holes_are_filled_and_what_is_given_stays(name, sampler):
    prompt = torch.tensor([[1, -1, 3, -1, 5], [8, -1, -1, 7, 6]])
    settings = Settings(max_new_tokens=3, max_denoising_steps=6, sampler=sampler, eos_token_id=5)
    states: list[Tensor] = []
    found = generate(bigram, prompt, settings, MIXINGS[name], on_step=lambda step: states.append(step.ids))
    for state in [*states, found.sequences]:
        assert torch.equal(state[:, :5][prompt >= 0], prompt[prompt >= 0])
    assert not bool((found.sequences == 4).any())


class Speller:
    """Logits sure of given texts [B, L], whatever it reads; the end token far from the sequences' ends too."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __call__(self, ids: Tensor, _prefix: int) -> Tensor:
        wanted = self.text[: len(ids), : ids.shape[1]]
        return 60.0 * torch.nn.functional.one_hot(wanted, 9).float()


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("sampler", ["ancestral", "adaptive"])
def test_sequences_end_at_their_first_end_token_behind_the_prompt(name, sampler):
    """End tokens in the prompt, repeated ones and those of the random tail cut nothing."""
    eos, pad = 1, 0
    text = torch.tensor(
        [[1, 5, 6, 7, 1, 8, 1, 5, 5, 5], [1, 5, 6, 6, 6, 6, 6, 1, 1, 1], [1, 5, 3, 3, 3, 3, 3, 3, 3, 3]]
    )
    settings = Settings(
        max_new_tokens=8, max_denoising_steps=9, block_length=4, sampler=sampler, eos_token_id=eos, pad_token_id=pad
    )
    found = generate(Speller(text), text[:, :2], settings, MIXINGS[name], seed=4)
    want = torch.tensor([[1, 5, 6, 7, 1, 0, 0, 0, 0, 0], [1, 5, 6, 6, 6, 6, 6, 1, 0, 0], text[2].tolist()])
    assert torch.equal(found.sequences, want)
    assert found.new_tokens.tolist() == [3, 6, 8]
    torch.testing.assert_close(found.tokens_per_forward, torch.tensor([3.0, 6.0, 8.0]) / found.forwards)


def test_generation_stops_when_every_sequence_has_ended():
    text = torch.tensor([[5, 5, 1, 6, 6, 6, 6, 6, 6, 6]])
    settings = Settings(max_new_tokens=8, max_denoising_steps=4, block_length=2, eos_token_id=1, reuse_logits=False)
    found = generate(Speller(text), text[:, :2], settings, MIXINGS["masked"])
    assert found.forwards in (4, 5)  # one block of four, not four
    assert found.sequences.tolist() == [[5, 5, 1, 1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("name", NOISES)
def test_no_end_comes_before_it_may(name):
    """Not from the model, and not from uniform noise that happens to spell it."""
    settings = Settings(max_new_tokens=12, max_denoising_steps=2, eos_token_id=5, min_new_tokens=9)
    prompt = torch.full((400, 2), 3)
    found = generate(lambda ids, _: torch.zeros(*ids.shape, 9), prompt, settings, MIXINGS[name])
    assert not bool((found.sequences[:, 2:11] == 5).any())
    assert bool((found.sequences[:, 11:] == 5).any())
    assert int(found.new_tokens.min()) >= 10


def test_a_stray_end_token_in_the_random_tail_ends_nothing():
    """A tail of 20 uniform tokens out of 8 nearly always holds the end token, while it is still noise."""
    text = torch.full((40, 26), 6)
    seen: list[bool] = []
    settings = Settings(max_new_tokens=24, max_denoising_steps=6, block_length=4, eos_token_id=1, temperature=0)
    found = generate(
        Speller(text), text[:, :2], settings, MIXINGS["uniform"],
        on_step=lambda step: seen.append(bool((step.ids[:, step.stop :] == 1).any())),
    )  # fmt: skip
    assert any(seen)
    assert found.new_tokens.tolist() == [24] * 40


def test_guidance_of_1_is_off_and_more_follows_the_prompt_more():
    """The logits are without + scale (with - without), the prompt replaced by pure noise in the second pass."""
    seen: list[Tensor] = []

    def model(ids: Tensor, prefix: int) -> Tensor:
        seen.append(ids.clone())
        likes = torch.nn.functional.one_hot(ids[:, :1], 9).float().expand(-1, ids.shape[1], -1)
        return likes * (1.0 if prefix else 0.0)

    prompt = torch.full((300, 1), 6)
    shares = []
    for scale in (1.0, 3.0, 6.0):
        settings = Settings(max_new_tokens=8, max_denoising_steps=20, guidance_scale=scale)
        sequences = generate(model, prompt, settings, MIXINGS["masked"]).sequences[:, 1:]
        shares.append(float((sequences == 6).double().mean()))
    expected = [np.exp(s) / (np.exp(s) + 7) for s in (1.0, 3.0, 6.0)]
    np.testing.assert_allclose(shares, expected, atol=0.05)
    assert {int(ids[0, 0]) for ids in seen} == {6, 4}


def test_adaptive_candidates_are_the_surest_positions_that_may_be_noise():
    probs = torch.zeros(1, 4, 9)
    for place, (token, p) in enumerate([(1, 0.9), (2, 0.6), (3, 0.99), (0, 0.8)]):
        probs[0, place] = (1 - p) / 7
        probs[0, place, 4] = 0
        probs[0, place, token] = p
    ids = torch.tensor([[4, 4, 3, 5]])
    chosen = {
        name: adaptive_candidates(Prediction(probs), ids, 0.0, noise=MIXINGS[name], count=2)[0].tolist()
        for name in NOISES
    }
    assert chosen["masked"] == [True, True, False, False]
    assert chosen["hybrid"] == [True, True, False, False]
    assert adaptive_candidates(Prediction(probs), torch.tensor([[7, 2, 3, 5]]), 0.0, noise=MIXINGS["uniform"], count=1)[
        0
    ].tolist() == [True, False, False, False]


def test_draws_are_the_project_s_philox_streams():
    sequences = torch.tensor([0, 3, 2**33 + 5])
    mine = CounterRNG(17, sequences, "cpu").words("some/name", 2, 9, draw=6)
    theirs = philox.Stream(17, "some/name").words(sequences.numpy(), 9, draw=6)
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one.numpy(), other[:, 2:].astype(np.int64))


@pytest.mark.parametrize(("shift", "scale"), [(-1000.0, 1.0), (0.0, 0.5), (2.0, 1.0), (1000.0, 1.0)])
def test_the_shipped_noise_is_the_project_s(shift, scale):
    levels = torch.linspace(-9, 9, 50, dtype=torch.float64)
    ours, shipped = HybridMixing(9, 4, shift, scale), HybridNoise(9, 4, shift, scale)
    assert torch.equal(ours.uniform_prob(levels), shipped.uniform_prob(levels))
    assert torch.equal(ours.mask_prob(levels), shipped.mask_prob(levels))
    prompt, settings = torch.tensor([[1, 2]]), Settings(max_new_tokens=6, max_denoising_steps=9)
    one, other = (generate(bigram, prompt, settings, noise).sequences for noise in (ours, shipped))
    assert torch.equal(one, other)


def test_streamers_get_the_prompt_drafts_and_finished_blocks():
    class Streamer:
        def __init__(self) -> None:
            self.calls: list[tuple[str, list[list[int]]]] = []

        def put(self, ids: Tensor) -> None:
            self.calls.append(("put", ids.tolist()))

        def put_draft(self, ids: Tensor) -> None:
            self.calls.append(("draft", ids.tolist()))

        def end(self) -> None:
            self.calls.append(("end", []))

    streamer = Streamer()
    settings = Settings(max_new_tokens=4, max_denoising_steps=3, block_length=2)
    found = generate(bigram, torch.tensor([[1, 2]]), settings, MIXINGS["hybrid"], streamer=streamer)
    kinds = [kind for kind, _ in streamer.calls]
    assert kinds == ["put", *(["draft"] * 4 + ["put"]) * 2, "end"]
    whole = list(itertools.chain(*(ids[0] for kind, ids in streamer.calls if kind == "put")))
    assert whole == found.sequences[0].tolist()


def test_settings_take_both_vocabularies_and_refuse_what_cannot_be():
    released = Settings.from_names(
        max_length=64, steps=16, sampling_method="adaptive", noise_schedule="linear", min_length=3, top_k=None
    )
    native = Settings.from_names(
        max_new_tokens=64, max_denoising_steps=16, sampler="adaptive", grid="linear", min_new_tokens=3
    )
    assert released == native
    for wrong, message in [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"max_denoising_steps": 0}, "max_denoising_steps must be at least 1"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"sampler": "greedy"}, "sampler must be ancestral or adaptive, got 'greedy'"),
        ({"grid": "square"}, "grid must be cosine or linear"),
    ]:
        with pytest.raises(ValueError, match=message):
            Settings(**{"max_new_tokens": 4, **wrong})
    with pytest.raises(TypeError, match="unknown setting 'beams'"):
        Settings.from_names(max_new_tokens=3, beams=2)
    with pytest.raises(TypeError, match="max_denoising_steps is given twice, as 3 and 4"):
        Settings.from_names(max_new_tokens=3, steps=3, max_denoising_steps=4)


def test_batches_that_would_depend_on_each_other_are_refused():
    settings = Settings(max_new_tokens=4, max_denoising_steps=4)
    with pytest.raises(ValueError, match=r"prompts of one length, got \[1, 2\]"):
        generate(bigram, torch.tensor([[1, 2], [1, -1]]), settings, MIXINGS["masked"])
    with pytest.raises(ValueError, match="one seed or one for each of 1 sequences, got 2"):
        generate(bigram, torch.tensor([[1, 2]]), settings, MIXINGS["masked"], seed=[1, 2])
    few = {"max_denoising_steps": 4, "sampler": "adaptive", "tokens_per_step": 1}
    with pytest.raises(ValueError, match="does not reach the 8 positions of a block"):
        Settings(max_new_tokens=8, **few)
    holes = torch.tensor([[1, *([-1] * 5), 2]])
    with pytest.raises(ValueError, match="does not reach the 9 positions of a block"):
        generate(bigram, holes, Settings(max_new_tokens=3, **few), MIXINGS["uniform"])


def test_no_module_of_this_project_is_needed(tmp_path):
    """The file alone, in a folder of its own, in a process that cannot import the project."""
    import subprocess
    import sys
    from pathlib import Path

    import megadiff.sampling.standalone as shipped

    (tmp_path / "sampling_gidd.py").write_text(Path(shipped.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    code = (
        "import sys; sys.modules['megadiff'] = None; sys.modules['numpy'] = None\n"
        "import torch, sampling_gidd as s\n"
        "m = lambda ids, _: torch.zeros(*ids.shape, 9)\n"
        "out = s.generate(m, torch.tensor([[1]]), s.Settings(5, 3), s.HybridNoise(9, 4, 0.0))\n"
        "print(out.sequences.shape[1])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout.strip() == "6", done.stderr
