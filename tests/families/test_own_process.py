"""A noise process in one file outside the package trains, resumes, evaluates, samples and is exported."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megadiff.testing import check_process
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import (
    Trained,
    largest_relative_difference,
    merged_sequences,
    toy_config,
    toy_tree,
    train_all,
)

STEPS, SAVED = 6, 3
EXACT = ("loss", "elbo", "kl", "grad_norm", "lr", "tokens")
NOISE = {"process": "own_noise_for_test.algebraic", "steepness": 0.4, "schedule": "cosine", "max_log_snr": 8}
TP2, PP2 = {"parallel__tensor": 2}, {"parallel__pipeline": 2}

ALGEBRAIC = '''"""Noise with an algebraic uniform share: u = (1 + y / sqrt(1 + y^2)) / 2, y = steepness * log_snr."""

from dataclasses import dataclass

from pydantic import Field

from megadiff.diffusion.config import ScheduledNoise
from megadiff.diffusion.processes import NoiseLaw


class Settings(ScheduledNoise):
    steepness: float = Field(default=0.5, gt=0, le=0.5)
    """Slope of y; up to 1/2 every rate of the process is positive."""


@dataclass(frozen=True)
class Algebraic(NoiseLaw):
    steepness: float

    def logit_u(self, log_snr, functions):
        y = self.steepness * log_snr
        return 2.0 * functions.log(y + functions.sqrt(1.0 + y * y))

    def dlogit_u(self, log_snr, functions):
        y = self.steepness * log_snr
        return 2.0 * self.steepness / functions.sqrt(1.0 + y * y)


def build(settings):
    return Algebraic(settings.steepness)
'''


@pytest.fixture(scope="module", autouse=True)
def _own_noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_noise_for_test").mkdir()
    (folder / "own_noise_for_test/algebraic.py").write_text(ALGEBRAIC)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def _stopped_after_step_3(whole: Path, folder: Path) -> None:
    """Copy a finished run as it was when its checkpoint of step 3 was the last."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / f"checkpoints/step_{STEPS:08d}")
    (folder / "LATEST").write_text(f"step_{SAVED:08d}\n")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["step"] <= SAVED) + "\n")


@pytest.fixture(scope="module")
def runs(toy_corpus, tmp_path_factory) -> tuple[Path, dict[str, list[Trained]]]:
    """A run of two ranks, and the same one continued after step 3 on its own layout and on another."""
    root = tmp_path_factory.mktemp("runs")

    def config(name: str, layout: dict[str, Any]):
        return toy_config(
            toy_corpus, root, name=name, noise=NOISE, schedule__steps=STEPS, checkpoint__every=SAVED,
            checkpoint__keep=0, eval__every=STEPS, **layout,
        )  # fmt: skip

    whole = on_ranks(2, train_all, [config("whole", TP2)], 2, save=True, timeout_s=1200)
    resumed = {"same": TP2, "other": PP2}
    for name in resumed:
        _stopped_after_step_3(root / "whole", root / name)
    configs = [config(name, layout) for name, layout in resumed.items()]
    again = on_ranks(2, train_all, configs, 2, timeout_s=1200)
    by_rank = {"whole": [rank[0] for rank in whole]}
    by_rank |= {name: [rank[which] for rank in again] for which, name in enumerate(resumed)}
    return root, by_rank


def test_it_keeps_the_contract():
    check_process(**{"name": NOISE["process"], **{key: value for key, value in NOISE.items() if key != "process"}})


def test_u_is_the_closed_form():
    process = check_process("own_noise_for_test.algebraic", steepness=0.4)
    for level in (-9.0, -1.0, 0.0, 2.5, 9.0):
        y = 0.4 * level
        wanted = (1 + y / math.sqrt(1 + y * y)) / 2
        assert float(process.exact_uniform_prob(level)) == pytest.approx(wanted, rel=1e-12)
        assert float(process.uniform_prob(torch.tensor(level, dtype=torch.float64))) == pytest.approx(wanted, rel=1e-12)


def test_it_resumes_bit_for_bit_with_the_same_noise_on_another_layout(runs):
    _, found = runs
    whole, same, other = (found[name][0].lines for name in ("whole", "same", "other"))
    assert [line["step"] for line in same] == list(range(1, STEPS + 1))
    assert [[line[key] for key in EXACT] for line in same] == [[line[key] for key in EXACT] for line in whole]
    bits = merged_sequences(found["whole"])
    for name in ("same", "other"):
        sequences = merged_sequences(found[name])
        assert sequences == {sample: bits[sample] for sample in sequences}
        assert len(sequences) == (STEPS - SAVED) * 8
    for key in ("loss", "elbo"):
        curves = [[line[key] for line in lines[SAVED:]] for lines in (other, whole)]
        assert largest_relative_difference(*curves) <= 1e-5
    assert found["same"][0].evaluations[-1]["eval_elbo"] == found["whole"][0].evaluations[-1]["eval_elbo"]


def test_the_commands_check_evaluate_and_sample_it(runs, toy_corpus, tmp_path):
    root, found = runs
    tree = toy_tree(toy_corpus, tmp_path, noise=NOISE)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    ended = call_forked("pretrain_dlm.py", "--config", tmp_path / "own.yaml", "--check")
    assert ended.code == 0, ended.err
    assert "steepness: 0.4" in ended.out
    ended = call_forked("pretrain_dlm.py", "--config", tmp_path / "own.yaml", "--check", "noise.steepness=0.6")
    assert (ended.code, "`noise.steepness` must be less than or equal to 0.5" in ended.err) == (2, True), ended.err
    ended = call_forked(
        "tools/evaluate.py", "elbo", "--model", root / "whole", "--data", toy_corpus, "--platform", "cpu",
        "--sequences", "7", "--noise-levels", "2", "--output", tmp_path / "elbo.json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    measured = json.loads((tmp_path / "elbo.json").read_text())["eval_elbo"]
    assert measured == pytest.approx(found["whole"][0].evaluations[-1]["eval_elbo"], rel=1e-5)
    ended = call_forked("tools/generate.py", "--model", root / "whole", "--platform", "cpu", "--steps", "4")
    assert ended.code == 0, ended.err


def test_an_export_samples_by_a_table_and_is_not_imported(runs, tmp_path):
    from megadiff.export.huggingface.generation_gidd import TableNoise

    root, _ = runs
    command = ("tools/convert_checkpoint.py", "export", "--checkpoint", root / "whole", "--output", tmp_path / "hf")
    ended = call_forked(*command)
    assert ended.code == 0, ended.err
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["min_log_snr"], config["max_log_snr"], "noise_type" in config) == (-9, 8, False)
    noise, levels = TableNoise(260, 3, **config["noise_table"]), np.linspace(-9, 9, 1001)
    y = 0.4 * levels
    wanted = torch.from_numpy((1 + y / np.sqrt(1 + y * y)) / 2)
    torch.testing.assert_close(noise.uniform_prob(torch.from_numpy(levels)), wanted, rtol=1e-7, atol=0)
    torch.testing.assert_close(noise.mask_prob(torch.from_numpy(levels)), 1 - wanted, rtol=1e-7, atol=0)
    command = ("tools/convert_checkpoint.py", "import", "--input", tmp_path / "hf", "--output", tmp_path / "back")
    ended = call_forked(*command)
    assert ended.code == 2
    assert "holds a table of its noise (noise_table), from which text can be sampled" in ended.err
