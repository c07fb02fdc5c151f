"""The report of a microbatch, against sums over tokens and sequences one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megadiff.diffusion.conditioning import NoisePattern
from megadiff.diffusion.config import ConditioningConfig, noise_config
from megadiff.diffusion.noise_process import build_process
from megadiff.diffusion.noising import NoisedBatch, noise_batch
from megadiff.diffusion.objective import Terms
from megadiff.parallel.step_metrics import (
    BIN_EDGES,
    SIZE,
    has_finite_loss,
    mean_loss,
    metrics_of,
    report_sums,
    sequence_counts,
)

ROWS, LENGTH = 24, 40
CONDITIONING = ConditioningConfig(per_token_noise=0.3, linear_noise=0.2, prompt=0.3, infilling=0.3, pad_insertion=0.4)


def noised(conditioning: ConditioningConfig) -> NoisedBatch:
    return noise_batch(
        np.random.default_rng(0).integers(4, 260, (ROWS, LENGTH)),
        seed=1,
        sample_index=np.arange(ROWS),
        process=build_process(noise_config(shift="balanced"), vocab_size=260, mask_id=3),
        conditioning=conditioning,
        stratified=True,
        global_batch=ROWS,
        batch_origin=0,
        pad_id=2,
    )


def reported(terms: Terms, sequences: NoisedBatch) -> torch.Tensor:
    return report_sums(terms, sequences, sequence_counts(sequences))


FRACTIONS = ("per_token_noise", "linear_noise", "prompt", "infilling", "pad_insertion")


def drawn_terms(sequences: NoisedBatch) -> Terms:
    draw = torch.Generator().manual_seed(2)
    return Terms(*(torch.rand(LENGTH, ROWS, generator=draw) * sequences.is_noisy.t() for _ in Terms._fields))


def one_by_one(terms: Terms, sequences: NoisedBatch) -> dict[str, float]:
    """Sums by name, in Python's own floats."""
    names = [
        *("loss", "elbo", "kl", "itakura_saito", "weight"),
        *("isotropic", "anisotropic", "conditioned"),
        "noisy",
    ]
    sums = dict.fromkeys([*names, "isotropic/tokens", "anisotropic/tokens", "conditioned/tokens"], 0.0)
    sums |= {f"fraction_{name}": 0.0 for name in FRACTIONS}
    sums |= {f"bin{i}{what}": 0.0 for i in range(len(BIN_EDGES) - 1) for what in ("", "/tokens")}
    for b in range(ROWS):
        is_kept, is_prompted = not bool(sequences.is_noisy[b].all()), int(sequences.prompt_length[b]) > 0
        kind = "isotropic" if int(sequences.pattern[b]) == NoisePattern.ISOTROPIC else "anisotropic"
        kind = "conditioned" if is_kept else kind
        sums["fraction_per_token_noise"] += int(sequences.pattern[b]) == NoisePattern.PER_TOKEN
        sums["fraction_linear_noise"] += int(sequences.pattern[b]) == NoisePattern.LINEAR
        sums["fraction_prompt"] += is_prompted
        sums["fraction_infilling"] += is_kept and not is_prompted
        for t in range(LENGTH):
            sums["fraction_pad_insertion"] += t > 0 and int(sequences.source[b, t]) == int(sequences.source[b, t - 1])
            if not bool(sequences.is_noisy[b, t]):
                continue
            loss, elbo, kl, divergence, weight, _ = (float(term[t, b]) for term in terms)
            values = {
                "loss": loss,
                "elbo": elbo,
                "kl": weight * kl,
                "itakura_saito": weight * divergence,
                "weight": weight,
            }
            level = float(sequences.log_snr[b, t])
            index = sum(level >= edge for edge in BIN_EDGES[1:-1])
            values |= {kind: elbo, f"{kind}/tokens": 1, "noisy": 1}
            values |= {f"bin{index}": weight * (kl + divergence), f"bin{index}/tokens": 1}
            for name, value in values.items():
                sums[name] += value
    return sums


@pytest.mark.parametrize("conditioning", [ConditioningConfig(), CONDITIONING], ids=["none", "all"])
def test_metrics_are_those_of_tokens_summed_one_by_one(conditioning):
    sequences = noised(conditioning)
    terms = drawn_terms(sequences)
    sums, found = one_by_one(terms, sequences), metrics_of(reported(terms, sequences).tolist())
    for name in ("loss", "elbo", "kl", "itakura_saito", "weight"):
        assert found[name] == pytest.approx(sums[name] / sums["noisy"], rel=1e-6)
    assert found["noisy_tokens"] == sums["noisy"]
    bins = [
        [low, high, pytest.approx(sums[f"bin{i}"] / sums[f"bin{i}/tokens"], rel=1e-6)]
        for i, (low, high) in enumerate(itertools.pairwise(BIN_EDGES))
        if sums[f"bin{i}/tokens"]
    ]
    assert found["loss_by_log_snr"] == bins
    assert len(bins) > 3
    if conditioning == ConditioningConfig():
        assert not any(name.startswith(("fraction_", "elbo_")) for name in found)
        return
    for kind in ("isotropic", "anisotropic", "conditioned"):
        assert found[f"elbo_{kind}"] == pytest.approx(sums[kind] / sums[f"{kind}/tokens"], rel=1e-6)
    for name in FRACTIONS:
        count = ROWS * LENGTH if name == "pad_insertion" else ROWS
        assert found[f"fraction_{name}"] == sums[f"fraction_{name}"] / count > 0


def test_reports_of_two_halves_add_up_to_that_of_the_whole():
    sequences = noised(CONDITIONING)
    terms = drawn_terms(sequences)
    halves = [
        reported(Terms(*(term[:, part] for term in terms)), sequences.part(part))
        for part in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS))
    ]
    whole = reported(terms, sequences)
    assert whole.shape == (SIZE,)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-12, atol=0)
    assert float(mean_loss(whole)) == metrics_of(whole.tolist())["loss"]


def test_a_level_on_an_edge_belongs_to_the_bin_above():
    sequences = noised(ConditioningConfig())
    terms = Terms(*(torch.ones(LENGTH, ROWS) for _ in Terms._fields))
    for level, low in ((-6.0, -6.0), (-6.0001, -9.0), (0.0, 0.0), (8.9, 6.0), (12.0, 6.0), (-20.0, -9.0)):
        moved = sequences._replace(log_snr=torch.full_like(sequences.log_snr, level))
        assert [entry[0] for entry in metrics_of(reported(terms, moved).tolist())["loss_by_log_snr"]] == [low]


def test_a_loss_that_is_no_number_is_seen_in_its_microbatch():
    sequences = noised(ConditioningConfig())
    terms = drawn_terms(sequences)
    broken = terms._replace(loss=torch.full_like(terms.loss, torch.nan))
    reports = torch.stack([reported(terms, sequences), reported(broken, sequences)])
    assert has_finite_loss(reports).tolist() == [True, False]
