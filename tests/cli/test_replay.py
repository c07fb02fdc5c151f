"""A step of a run of two ranks, taken again on one process: the same noise bits, the same loss, and nothing written."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadiff.checkpoint.manifest import read_manifest
from megadiff.errors import CheckpointError, ConfigError, DataError
from megadiff.metric_lines import read_metrics
from tests.support.commands import REPOSITORY, call
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import merged_sequences, toy_config, train_all, write_corpus

pytestmark = pytest.mark.timeout(1800)

STEPS = 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_sp": {"parallel__tensor": 2, "parallel__sequence": True},
    "dp2_distopt": {"parallel__distributed_optimizer": True},
    "pp2_vp2": {
        "parallel__pipeline": 2,
        "parallel__virtual_pipeline": 2,
        "conditioning__prompt": 0.3,
        "conditioning__per_token_noise": 0.2,
    },
}


@pytest.fixture(scope="module")
def trained(toy_corpus, tmp_path_factory):
    """{layout: (config, sequences' hashes by sample)} of finished runs with a checkpoint after steps 4 and 8."""
    root = tmp_path_factory.mktemp("runs")
    configs = {
        name: toy_config(
            toy_corpus,
            root,
            name=name,
            schedule__steps=STEPS,
            checkpoint__every=4,
            checkpoint__keep=0,
            data__valid=[],
            **layout,
        )
        for name, layout in LAYOUTS.items()
    }
    ranks = on_ranks(2, train_all, list(configs.values()), 2, save=True, timeout_s=1200)
    return {
        name: (config, merged_sequences([ranks[rank][i] for rank in (0, 1)]))
        for i, (name, config) in enumerate(configs.items())
    }


def replayed(run: Path, step: int, overrides=(), *, save: Path | None = None):
    """Return the findings of `replay` and a digest of every sequence, from a process of their own."""

    def summed(values):
        digests = {}
        for place, sequence in enumerate(values.sequences):
            digest = hashlib.sha256()
            for column in values.batch.columns().values():
                digest.update(column[place].numpy().tobytes())
            digests[sequence.sample] = digest.hexdigest()
        return digests

    from megadiff.run.replay import replay

    found = replay(run, step, list(overrides))
    if save is not None:
        found.save(save)
    facts = {
        "figures": found.figures,
        "differences": found.differences(),
        "sequences": found.sequences,
        "start": found.start,
    }
    return {**facts, "between": found.steps_between, "skip": found.skip, "broken": found.broken_sequence}, summed(found)


def in_a_fork(*arguments, fn=replayed, **options):
    """The parent stays free of process groups."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(fn, *arguments, **options).result()


def contents(folder: Path) -> dict[str, Any]:
    """Every file with its bytes and time."""
    return {
        str(path): (path.stat().st_mtime_ns, path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest())
        for path in [folder, *sorted(folder.rglob("*"))]
    }


CASES = [
    ("tp2_sp", 7, 2),
    ("tp2_sp", 5, 0),
    ("tp2_sp", 8, 3),
    ("tp2_sp", 2, 1),
    ("dp2_distopt", 6, 1),
    ("pp2_vp2", 7, 2),
]


@pytest.mark.parametrize(("name", "step", "between"), CASES)
def test_a_step_of_two_ranks_replays_on_one_and_writes_nothing(trained, name, step, between):
    config, hashes = trained[name]
    before = contents(config.folder)
    found, digests = in_a_fork(config.folder, step)
    assert contents(config.folder) == before
    assert digests == {sample: hashes[sample] for sample in range(8 * (step - 1), 8 * step)}, "noise bits"
    assert found["differences"]["loss"] <= 1e-5
    assert found["differences"]["elbo"] <= 1e-5
    assert found["differences"]["grad_norm"] <= 1e-4
    assert found["start"] == ("checkpoint step_00000004" if step > 4 else "the first weights")
    assert (found["between"], found["skip"], found["broken"]) == (between, None, None)


def test_sequences_sum_to_the_loss_and_lie_in_the_data_where_stated(trained, toy_corpus, tmp_path):
    from megadiff.data.indexed_reader import IndexedReader

    config, _ = trained["pp2_vp2"]
    found, _ = in_a_fork(config.folder, 5, save=tmp_path / "step.npz")
    sequences, reader = found["sequences"], IndexedReader(toy_corpus)
    noisy = sum(sequence.noisy_tokens for sequence in sequences)
    assert sum(sequence.loss * sequence.noisy_tokens for sequence in sequences) / noisy == pytest.approx(
        found["figures"]["loss"], rel=1e-6
    )
    assert sum(sequence.elbo * sequence.noisy_tokens for sequence in sequences) / noisy == pytest.approx(
        found["figures"]["elbo"], rel=1e-6
    )
    with np.load(tmp_path / "step.npz", allow_pickle=False) as saved:
        assert saved["samples"].tolist() == [sequence.sample for sequence in sequences] == list(range(32, 40))
        for place, sequence in enumerate(sequences):
            clean = saved["clean"][place]
            assert reader.tokens(sequence.origin.token, 16).tolist() == clean.tolist()
            assert reader.document(sequence.origin.document)[sequence.origin.within] == clean[0]
            assert saved["is_noisy"][place].sum() == sequence.noisy_tokens
            assert saved["loss"][place].sum() == pytest.approx(sequence.loss * sequence.noisy_tokens, rel=1e-5)


def test_a_run_with_a_hole_in_its_checkpoints_starts_from_an_older_one(trained, tmp_path):
    config, _ = trained["tp2_sp"]
    run = tmp_path / "moved"
    shutil.copytree(config.folder, run)
    largest = max((run / "checkpoints/step_00000004").glob("*.distcp"), key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    before = contents(run)
    found, _ = in_a_fork(run, 6)
    assert (found["start"], found["between"]) == ("the first weights", 5)
    assert found["differences"]["loss"] <= 1e-5
    assert contents(run) == before, "a damaged checkpoint is left where it is"


def test_what_the_health_checks_remember_is_in_the_checkpoint(trained):
    config, _ = trained["tp2_sp"]
    lines = {line["step"]: line for line in read_metrics(config.folder / "metrics.jsonl")}
    health = read_manifest(config.folder / "checkpoints/step_00000004").health
    assert health["loss"] == [lines[step]["loss"] for step in (1, 2, 3, 4)]
    assert health["grad_norm"] == [lines[step]["grad_norm"] for step in (1, 2, 3, 4)]
    assert (health["non_finite_consecutive"], health["skipped"]) == (0, 0)


def replayed_with_one_broken_sequence(run: Path, step: int, sample: int, what: str):
    """One sample whose loss is not finite, or, with finite losses, whose gradient is not."""
    from megadiff.methods.gidd import Gidd
    from megadiff.run import replay

    honest = replay.build_loss

    class Broken(Gidd):
        clean: torch.Tensor

        def loss(self, hidden, lm_head_weight, batch, shard):
            here = (batch.sequences.clean == self.clean).all(dim=1)
            if what == "gradient":
                hidden.register_hook(lambda gradient: gradient.masked_fill(here[None, :, None], float("nan")))
                return super().loss(hidden, lm_head_weight, batch, shard)
            answer = super().loss(hidden, lm_head_weight, batch, shard)
            terms = answer.terms._replace(loss=answer.terms.loss.masked_fill(here[None, :], float("inf")))
            return answer._replace(loss=answer.loss + (float("inf") if here.any() else 0.0), terms=terms)

    def build_loss(prepared, platform):
        kernel, method = honest(prepared, platform)
        broken = Broken(method.context)
        broken.clean = torch.from_numpy(prepared.data.train.sequences([sample])[0])
        return kernel, broken

    replay.build_loss = build_loss
    return replayed(run, step)


def test_the_first_sequence_whose_loss_is_not_finite_is_found(trained):
    found, _ = in_a_fork(trained["tp2_sp"][0].folder, 5, 37, "loss", fn=replayed_with_one_broken_sequence)
    assert [sequence.sample for sequence in found["sequences"] if not sequence.is_finite] == [37]
    assert (found["skip"], found["broken"]) == ("non_finite", 37)
    assert found["differences"]["loss"] is None


def test_with_finite_losses_the_first_broken_gradient_is_found(trained):
    found, _ = in_a_fork(trained["tp2_sp"][0].folder, 5, 37, "gradient", fn=replayed_with_one_broken_sequence)
    assert all(sequence.is_finite for sequence in found["sequences"])
    assert (found["skip"], found["broken"]) == ("non_finite", 37)


def test_what_cannot_be_replayed_is_said_in_one_sentence(trained, tmp_path):
    config, _ = trained["tp2_sp"]
    other = write_corpus(tmp_path / "other", seed=9)
    for step in (0, 9):
        with pytest.raises(
            ConfigError, match=rf"--step {step}: the run .*tp2_sp has the steps 1 to 8; give one of them"
        ):
            in_a_fork(config.folder, step)
    with pytest.raises(ConfigError, match=r"--run .*nowhere: there is no such folder; give the folder of a run"):
        in_a_fork(tmp_path / "nowhere", 3)
    with pytest.raises(ConfigError, match=r"it has no config\.yaml; give the folder of a run"):
        in_a_fork(tmp_path, 3)
    with pytest.raises(DataError, match=r"data.train\[0\]: gone: no indexed data"):
        in_a_fork(config.folder, 3, ["data.train=[gone]"])
    with pytest.raises(CheckpointError, match="step_00000004 was trained with training data of fingerprint"):
        in_a_fork(config.folder, 6, [f"data.train=[{other}]"])
    with pytest.raises(CheckpointError, match=r"branched from .*lost, and neither that nor a checkpoint of its own"):
        in_a_fork(config.folder, 3, ["checkpoint.start_from=lost"])


def test_the_command_prints_a_table_and_refuses_to_write_into_the_run(trained, tmp_path):
    config, _ = trained["dp2_distopt"]
    tool = REPOSITORY / "tools/replay.py"
    before = contents(config.folder)
    code, out, err = call(tool, "--run", config.folder, "--step", 7, "--sequences", 3, "--save", tmp_path / "s.npz")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["step 5", "step 6"]
    assert lines[2] == "step 7, from checkpoint step_00000004, 2 step(s) taken in memory"
    assert [line.split()[0] for line in lines[4:7]] == ["48", "49", "50"]
    assert "(5 more sequences; --sequences 0 shows all)" in lines[7]
    assert all("was logged, relative difference" in line for line in lines[8:11])
    assert (tmp_path / "s.npz").is_file()
    inside = config.folder / "s.npz"
    code, _, err = call_forked(tool, "--run", config.folder, "--step", 7, "--save", inside)
    assert (code, err) == (
        2,
        f"error: --save {inside}: that is inside the run folder, which is only read; give another place\n",
    )
    assert contents(config.folder) == before
