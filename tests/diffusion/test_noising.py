"""The noise contract: same bits whatever the batch, right frequencies, even levels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy import stats

from megadiff.diffusion import noising
from megadiff.diffusion.conditioning import NoisePattern
from megadiff.diffusion.config import ConditioningConfig
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noising import (
    NoisedBatch,
    evaluation_noise,
    evaluation_quantiles,
    noise_batch,
    stratified_quantiles,
)
from megadiff.diffusion.philox import Stream, below
from megadiff.errors import ConfigError, DataError
from tests.golden import make_noise_hashes

V, MASK = 11, 6
EVERYTHING = ConditioningConfig(per_token_noise=0.3, linear_noise=0.2, prompt=0.5, infilling=0.4, pad_insertion=0.3)


def sequences_of(count: int, length: int = 64, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng(seed).integers(0, V - 1, (count, length))
    return ids + (ids >= MASK)


def noised(clean: np.ndarray, index, shift: float = 0.0, **kwargs) -> NoisedBatch:
    kwargs = {"seed": 5, "process": HybridMixing(V, MASK, shift), "pad_id": 2, **kwargs}
    return noise_batch(clean, sample_index=index, **kwargs)


def test_the_bits_are_those_of_the_committed_file():
    assert make_noise_hashes.make() == json.loads(make_noise_hashes.FILE.read_text())


@pytest.mark.parametrize("global_batch", [None, 24])
def test_a_sequence_depends_on_its_index_alone(global_batch):
    clean, index = sequences_of(24), np.arange(1000, 1024)
    whole = noised(clean, index, conditioning=EVERYTHING, global_batch=global_batch)
    order = np.random.default_rng(1).permutation(24)
    pieces = [order[:1], order[1:6], order[6:]]
    for piece in pieces:
        part = noised(clean[piece], index[piece], conditioning=EVERYTHING, global_batch=global_batch)
        for name, values in part.columns().items():
            assert torch.equal(values, getattr(whole, name)[torch.from_numpy(piece)]), name


@pytest.mark.parametrize("tokens", [1, 200, 10**6])
def test_sequences_may_be_worked_on_in_blocks_of_any_size(tokens, monkeypatch):
    clean, index, process = sequences_of(24), np.arange(2**32 - 9, 2**32 + 15), HybridMixing(V, MASK, 0.0)

    def made() -> list[NoisedBatch]:
        fixed = evaluation_noise(clean, seed=0, sequence_index=index, level=1, num_levels=4, process=process)
        return [noised(clean, index, conditioning=EVERYTHING), noised(clean, index, shift=-1000.0), fixed]

    want = made()
    monkeypatch.setattr(noising, "_BLOCK_TOKENS", tokens)
    for one, other in zip(want, made(), strict=True):
        for name, values in one.columns().items():
            assert torch.equal(values, getattr(other, name)), name


@pytest.mark.parametrize("conditioning", [ConditioningConfig(), EVERYTHING])
def test_the_sequences_given_are_not_written_to(conditioning):
    clean = sequences_of(8)
    before = clean.copy()
    clean.flags.writeable = False  # a view of a file, say
    got = noised(clean, np.arange(8), conditioning=conditioning)
    got.clean.zero_()
    got.noised.zero_()
    assert (clean == before).all()


def test_torch_and_numpy_sequences_of_any_integer_type_give_the_same():
    clean = sequences_of(3)
    want = noised(clean, [0, 1, 2])
    for same in (torch.from_numpy(clean), clean.astype(np.uint16), torch.from_numpy(clean).int()):
        got = noised(same, torch.tensor([0, 1, 2]))
        assert torch.equal(got.noised, want.noised)
        assert got.noised.dtype == torch.int64
    assert want.log_snr.dtype == torch.float32
    assert want.is_noisy.dtype == torch.bool


def test_seeds_prefixes_and_sequences_differ():
    clean = sequences_of(1, 4096)
    base = noised(clean, [7])
    others = [
        noised(clean, [7], seed=6),
        noised(clean, [7], prefix="eval"),
        noised(clean, [8]),
        noised(clean, [7 + 2**32]),
    ]
    for other in others:
        assert not torch.equal(other.log_snr, base.log_snr)
        assert not torch.equal(other.noised, base.noised)


@pytest.mark.parametrize("shift", [-1000.0, -2.0, 0.0, 2.0, 1000.0])
def test_kept_masked_and_random_tokens_come_as_often_as_the_process_says(shift):
    process = HybridMixing(V, MASK, shift)
    clean = sequences_of(64, 2048)
    for level in (0, 3, 7):
        got = evaluation_noise(clean, seed=0, sequence_index=np.arange(64), level=level, num_levels=8, process=process)
        lam = got.log_snr[:, 0].double()
        q = process.marginal(torch.nn.functional.one_hot(got.clean, V).double(), lam[:, None].expand(got.clean.shape))
        expected, seen = q.sum((0, 1)), torch.bincount(got.noised.reshape(-1), minlength=V).double()
        spread = (q * (1 - q)).sum((0, 1)).sqrt()
        assert bool(((seen - expected).abs() <= 4.5 * spread + 1e-9).all())
        kept = (got.noised == got.clean).double().sum()
        p_kept = q.gather(-1, got.clean.unsqueeze(-1))
        assert abs(kept - p_kept.sum()) <= 4.5 * (p_kept * (1 - p_kept)).sum().sqrt()
    assert (shift != 1000) or not bool((got.noised == MASK).any())


def test_replacement_tokens_are_uniform_over_the_real_tokens():
    got = evaluation_noise(
        np.zeros((64, 4096), dtype=np.int64),
        seed=3,
        sequence_index=np.arange(64),
        level=49,
        num_levels=50,
        process=HybridMixing(V, MASK, 1000),
    )
    at_noise = got.noised[:, :][got.log_snr < -3]
    counts = np.bincount(at_noise.numpy(), minlength=V)
    assert counts[MASK] == 0
    others = np.delete(counts, [0, MASK])  # token 0 is also what is kept
    assert stats.chisquare(others).pvalue > 1e-4


@pytest.mark.parametrize("global_batch", [1, 2, 5, 24, 100])
def test_every_global_batch_covers_the_schedule_evenly(global_batch):
    for step in range(3):
        index = np.arange(step * global_batch, (step + 1) * global_batch)
        t = torch.sigmoid(
            -noised(sequences_of(global_batch, 2), index, global_batch=global_batch).log_snr[:, 0].double()
        )
        low, high = torch.sigmoid(torch.tensor([-9.0, 9.0]).double())
        u = ((t - low) / (high - low)).numpy()
        assert sorted(np.floor(u * global_batch + 1e-4 * (1 - u)).astype(int)) == list(range(global_batch)), step


def test_a_batch_s_offset_is_drawn_at_its_first_sample():
    """By the vector form of the draw; with an origin that makes the first batch begin before sample 0."""
    stream, sequences, jitter = Stream(4, "train/batch"), np.array([0, 1, 2, 2**40, 2**40 + 1]), np.full(5, 0.5)
    high, low, *_ = stream.words(sequences - (sequences - 2) % 8, 1)
    offset = below(high, low, 8)[:, 0].astype(np.int64)
    stratum = np.floor(stratified_quantiles(stream, sequences, jitter, 8, 2) * 8).astype(np.int64)
    assert stratum.tolist() == ((offset + (sequences - 2) % 8 * 5) % 8).tolist()


def test_neighbouring_samples_share_the_schedule_alike():
    """The mean t of a micro-batch of 8 out of 64 strays from 1/2 half as far as that of independent draws."""
    got = noised(sequences_of(64, 2), np.arange(64), global_batch=64)
    t = torch.sigmoid(-got.log_snr[:, 0].double()).reshape(8, 8)
    assert float((t.mean(1) - 0.5).square().mean().sqrt()) < 0.6 * (1 / 12 / 8) ** 0.5


def test_each_sample_s_level_is_uniform_over_steps():
    """Slot 3 of a global batch of 8, over 4000 steps."""
    index = np.arange(4000) * 8 + 3
    t = torch.sigmoid(-noised(sequences_of(4000, 1), index, global_batch=8).log_snr[:, 0].double())
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3


def test_a_batch_rampup_keeps_batches_even():
    index = np.arange(40, 56)
    got = noised(sequences_of(16, 2), index, global_batch=16, batch_origin=40)
    t = torch.sigmoid(-got.log_snr[:, 0].double())
    assert sorted((t * 16).floor().int().tolist()) == list(range(16))


def test_unstratified_levels_are_independent():
    one = noised(sequences_of(4, 8), np.arange(4), global_batch=4, stratified=False)
    assert torch.equal(one.log_snr, noised(sequences_of(4, 8), np.arange(4)).log_snr)


def test_noise_free_positions_are_untouched_and_said_to_be():
    got = noised(sequences_of(400), np.arange(400), conditioning=EVERYTHING)
    free = ~got.is_noisy
    assert torch.equal(got.noised[free], got.clean[free])
    assert bool((got.log_snr[free] == 9.0).all())
    prompt = torch.arange(64) < got.prompt_length[:, None]
    assert bool(free[prompt].all())
    assert 0.05 < float((free & ~prompt).float().mean()) < 0.4  # infilling
    assert bool((got.prompt_length > 0).any())
    assert bool((got.prompt_length == 0).any())


def test_level_patterns_come_as_often_as_asked_and_look_as_they_should():
    config = ConditioningConfig(per_token_noise=0.3, linear_noise=0.2)
    got = noised(sequences_of(2000), np.arange(2000), conditioning=config)
    share = torch.bincount(got.pattern.int(), minlength=3) / 2000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), atol=0.04, rtol=0)
    distinct = torch.tensor([len(sequence.unique()) for sequence in got.log_snr])
    assert bool((distinct[got.pattern == NoisePattern.ISOTROPIC] == 1).all())
    assert bool((distinct[got.pattern == NoisePattern.PER_TOKEN] > 60).all())
    linear = got.log_snr[got.pattern == NoisePattern.LINEAR]
    assert bool((linear.diff(dim=1) < 0).all())
    t = torch.sigmoid(-got.log_snr[got.pattern == NoisePattern.PER_TOKEN].double()).reshape(-1)
    assert stats.kstest(t.numpy(), "uniform").pvalue > 1e-3


def test_empty_tokens_are_targets_like_any_other():
    config = ConditioningConfig(pad_insertion=0.4)
    clean = np.tile(np.arange(3, 6), (200, 40))
    got = noised(clean, np.arange(200), conditioning=config)
    is_empty = got.clean == 2
    assert float(is_empty.float().mean()) == pytest.approx(0.2, abs=0.03)
    for sequence, source, empty in zip(got.clean, got.source, is_empty, strict=True):
        kept = sequence[~empty]
        assert torch.equal(kept, torch.from_numpy(clean[0])[: len(kept)])
        assert torch.equal(source[~empty], torch.arange(len(kept)))
    assert bool(got.is_noisy.all())


def test_evaluation_levels_are_stratified_and_fixed():
    u = evaluation_quantiles(0, np.arange(50), 8)
    assert (np.floor(u * 8) == np.arange(8)).all()
    assert stats.kstest((u[:, 0] * 8), "uniform").pvalue > 1e-3
    clean, process = sequences_of(4), HybridMixing(V, MASK, 0.0)
    kwargs = {"seed": 0, "level": 2, "num_levels": 8, "process": process}
    whole = evaluation_noise(clean, sequence_index=np.arange(4), **kwargs)
    part = evaluation_noise(clean[2:3], sequence_index=[2], **kwargs)
    assert torch.equal(part.noised[0], whole.noised[2])
    other = evaluation_noise(clean, sequence_index=np.arange(4), **{**kwargs, "level": 3})
    assert not torch.equal(other.noised, whole.noised)
    with pytest.raises(ValueError, match=r"level must lie in \[0, 8\)"):
        evaluation_noise(clean, sequence_index=np.arange(4), **{**kwargs, "level": 8})


def test_the_mask_and_foreign_ids_in_the_data_are_refused():
    with pytest.raises(DataError, match="contain the mask token"):
        noised(np.full((1, 4), MASK), [0])
    with pytest.raises(DataError, match="outside the vocabulary of 11"):
        noised(np.full((1, 4), V), [0])


def test_wrong_shapes_and_missing_pads_are_refused():
    with pytest.raises(ValueError, match=r"sample_index \[B\]"):
        noised(sequences_of(2), [0])
    with pytest.raises(ValueError, match="counts from 0"):
        noised(sequences_of(1), [-1])
    with pytest.raises(ConfigError, match="pad id"):
        noised(sequences_of(1), [0], conditioning=ConditioningConfig(pad_insertion=0.1), pad_id=None)


def test_no_global_generator_is_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    noised(sequences_of(4), np.arange(4), conditioning=EVERYTHING)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_an_empty_batch_is_a_batch():
    got = noised(np.zeros((0, 8), dtype=np.int64), [])
    assert got.noised.shape == (0, 8)
