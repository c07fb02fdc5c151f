"""The experiments' run descriptions load, with the overrides their READMEs give."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megadiff.config.load import load_config
from megadiff.config.schema import dotted_keys
from megadiff.model import cost
from megadiff.run.config import RunConfig

EXPERIMENTS = Path(__file__).parents[2] / "examples" / "experiments"
THREE = ("noise_interpolation", "batch_size_sweep", "snr_against_time")

TIME = ("noise.process=gidd_time", "objective.weighting=dynamic")
NOISES = [
    (f"name={shift}", f"noise.shift={shift}")
    for shift in ("masked", "low_uniform", "balanced", "high_uniform", "uniform")
]
FORMS = [
    ("noise.shift=masked",),
    ("noise.shift=low_uniform",),
    TIME,
    (*TIME, "noise.p_uniform=0.1"),
    (*TIME, "noise.p_uniform=0.2"),
]


def batches(*sizes: int) -> list[tuple[str, ...]]:
    return [
        (f"batch.global_batch_size={sequences}", f"batch.micro_batch_size={min(sequences, 4)}") for sequences in sizes
    ]


RUNS = {
    ("noise_interpolation", "full"): NOISES,
    ("noise_interpolation", "small"): NOISES,
    ("snr_against_time", "full"): FORMS,
    ("snr_against_time", "small"): FORMS,
    ("batch_size_sweep", "full"): batches(16, 32, 64, 128, 256, 512),
    ("batch_size_sweep", "small"): batches(4, 8, 16, 32, 64),
}


@pytest.mark.parametrize(
    ("experiment", "size", "overrides"), [(*where, run) for where, runs in RUNS.items() for run in runs]
)
def test_every_run_of_an_experiment_loads(experiment, size, overrides):
    load_config(EXPERIMENTS / experiment / f"{size}.yaml", overrides, RunConfig)


@pytest.mark.parametrize(
    ("experiment", "paper"),
    [("noise_interpolation", 85_064_448), ("batch_size_sweep", 201_556_992), ("snr_against_time", 85_064_448)],
)
def test_the_full_sizes_are_the_papers(experiment, paper):
    config = load_config(EXPERIMENTS / experiment / "full.yaml", [], RunConfig)
    assert cost.paper_parameters(config.shape(vocab_size=config.data.vocab_size or 0)) == paper


@pytest.mark.parametrize("experiment", THREE)
def test_the_readme_names_files_and_settings_that_exist(experiment):
    text = (EXPERIMENTS / experiment / "README.md").read_text(encoding="utf-8")
    root = EXPERIMENTS.parents[1]
    for path in set(re.findall(r"(?:examples|tools)/[\w./]+\.(?:yaml|py)", text)):
        assert (root / path).is_file(), path
    keys = {word.partition("=")[0] for word in shlex.split(text.replace("'", ""), comments=False) if "." in word}
    for key in sorted(key for key in keys if re.fullmatch(r"(noise|objective|batch|optimizer|schedule)\.\w+", key)):
        assert key in dotted_keys(RunConfig), key
