"""Write noise_hashes.json and time_noise_hashes.json: SHA-256 of the bits of noised sequences.

Run from the repository root, and only on purpose:

    .venv/bin/python tests/golden/make_noise_hashes.py

A change of any hash means that a run started before it cannot go on with the same noise after it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from megadiff.diffusion.config import ConditioningConfig
from megadiff.diffusion.mixing import HybridMixing
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.diffusion.noising import NoisedBatch, evaluation_noise, noise_batch
from megadiff.diffusion.processes.gidd_time import GiddTime, TimeSchedule
from megadiff.diffusion.schedules import SCHEDULES

FILE = Path(__file__).with_name("noise_hashes.json")
TIME_FILE = Path(__file__).with_name("time_noise_hashes.json")
VOCAB, MASK, PAD, LENGTH = 131072, 3, 2, 512
SHIFTS = [-1000.0, -2.0, 0.0, 2.0, 1000.0]
CONDITIONINGS = {
    "none": {},
    "as_released": {"preset": "as_released"},
    "as_described": {"preset": "as_described"},
    "everything": {
        "per_token_noise": 0.3,
        "linear_noise": 0.3,
        "prompt": 0.5,
        "infilling": 0.5,
        "pad_insertion": 0.3,
        "max_fraction": 0.9,
    },
}


def clean_sequences(sequences: np.ndarray) -> np.ndarray:
    """Ids that are a plain function of (sequence, position), none below 4."""
    return 4 + (sequences[:, None] * 7919 + np.arange(LENGTH) * 104729) % (VOCAB - 4)


def digest(noised: NoisedBatch) -> dict[str, str]:
    """Hashes of the little-endian bytes of the two arrays a resumed run must get again."""
    return {
        "noised": hashlib.sha256(noised.noised.numpy().astype("<i8").tobytes()).hexdigest(),
        "log_snr": hashlib.sha256(noised.log_snr.numpy().astype("<f4").tobytes()).hexdigest(),
    }


def make() -> dict[str, dict[str, str]]:
    """A hash for each setting's name."""
    hashes = {}
    for seed, first in ((0, 0), (1234, 5_000_000_000)):
        sequences = np.arange(first, first + 16)
        for shift in SHIFTS:
            process = HybridMixing(VOCAB, MASK, shift)
            for name, settings in CONDITIONINGS.items():
                noised = noise_batch(
                    clean_sequences(sequences),
                    seed=seed,
                    sample_index=sequences,
                    process=process,
                    conditioning=ConditioningConfig.model_validate(settings),
                    global_batch=24,
                    pad_id=PAD,
                )
                hashes[f"seed {seed}, rows {first}+16, shift {shift:g}, conditioning {name}"] = digest(noised)
    sequences = np.arange(16)
    process = HybridMixing(VOCAB, MASK, 0.0, 0.5)
    for name, schedule in SCHEDULES.items():
        drawn = process.with_schedule(schedule())
        noised = noise_batch(
            clean_sequences(sequences), seed=0, sample_index=sequences, process=drawn, stratified=False
        )
        hashes[f"scale 0.5, rate {name}, not stratified"] = digest(noised)
        noised = evaluation_noise(
            clean_sequences(sequences), seed=0, sequence_index=sequences, level=3, num_levels=8, process=drawn
        )
        hashes[f"scale 0.5, rate {name}, evaluation level 3 of 8"] = digest(noised)
    return hashes


def make_time() -> dict[str, dict[str, str]]:
    """The same for the time form."""
    hashes, sequences = {}, np.arange(16)
    for p_uniform, gamma in ((0.0, 1.0), (0.2, 1.0), (0.2, 0.5)):
        law = GiddTime(p_uniform, gamma)
        for name, settings in CONDITIONINGS.items():
            noised = noise_batch(
                clean_sequences(sequences),
                seed=0,
                sample_index=sequences,
                process=NoiseProcess(VOCAB, MASK, law, TimeSchedule(law)),
                conditioning=ConditioningConfig.model_validate(settings),
                global_batch=24,
                pad_id=PAD,
            )
            hashes[f"p_uniform {p_uniform:g}, gamma {gamma:g}, conditioning {name}"] = digest(noised)
    return hashes


if __name__ == "__main__":
    FILE.write_text(json.dumps(make(), indent=1) + "\n")
    TIME_FILE.write_text(json.dumps(make_time(), indent=1) + "\n")
