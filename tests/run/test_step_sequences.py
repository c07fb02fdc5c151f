"""The sequences that are shown of a step against those that real runs, on several layouts, took in that step."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np
import pytest

from megadiff.data.indexed_reader import IndexedReader
from megadiff.errors import CheckpointError, ConfigError
from megadiff.run.resume import ResumeOptions
from megadiff.run.step_sequences import ShownSequence, document_borders, step_sequences
from tests.data.corpora import random_documents, write_indexed
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, watched, wire_on_rank, write_corpus

pytestmark = pytest.mark.timeout(1800)

STEPS, SAVED = 6, 3
ONE = {"data__valid": [], "checkpoint__every": SAVED, "checkpoint__keep": 0, "schedule__steps": STEPS}
CONDITIONED = {
    "conditioning__prompt": 0.4,
    "conditioning__infilling": 0.2,
    "conditioning__pad_insertion": 0.3,
    "conditioning__per_token_noise": 0.3,
    "conditioning__linear_noise": 0.2,
}
RAMPED = {"batch__rampup": {"start": 4, "increment": 4, "every_steps": 2}}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one_rank": (1, CONDITIONED),
    "dp2": (2, {**CONDITIONED, **RAMPED, "batch__micro_batch_size": 1, "parallel__distributed_optimizer": True}),
    "tp2": (2, {**CONDITIONED, "noise__shift": "uniform", "parallel__tensor": 2, "parallel__sequence": True}),
    "pp2_masked": (2, {"noise__shift": "masked", "parallel__pipeline": 2}),
    "next_token": (1, {"method__name": "next_token"}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sources of different sizes, whose documents are shorter and longer than a sequence."""
    folder = tmp_path_factory.mktemp("sources")
    sizes = {"a": random_documents(120, seed=1), "b": random_documents(60, seed=2, longest=9)}
    return [str(write_indexed(folder / name, documents)) for name, documents in sizes.items()]


def taken_on_rank(configs, world_size, options=None):
    """Train each run, and return for each what its steps took: {sample: columns of the batch}."""
    return [_taken(config, world_size, options) for config in configs]


def _taken(config, world_size, options):
    run = wire_on_rank(config, world_size, options)
    found = {}

    def record(sample, sequence):
        found[sample] = {name: column.tolist() for name, column in sequence.columns().items()}

    run.microbatches = watched(run.microbatches, run, config.batch.micro_batch_size, record)
    run.train()
    return found


@pytest.fixture(scope="module")
def runs(sources, tmp_path_factory):
    """{case: (config, what each sample of the finished run was)}."""
    root = tmp_path_factory.mktemp("runs")
    configs = {
        name: toy_config(sources[0], root, name=name, data__train=sources, **{**ONE, **settings})
        for name, (_, settings) in CASES.items()
    }
    found = {}
    for ranks in (1, 2):
        names = [name for name, (count, _) in CASES.items() if count == ranks]
        by_rank = on_ranks(ranks, taken_on_rank, [configs[name] for name in names], ranks)
        for place, name in enumerate(names):
            found[name] = configs[name], {k: v for taken in by_rank for k, v in taken[place].items()}
    return found


def in_a_fork(*arguments, **options):
    """Return the result of `step_sequences` in a process of its own, in which no test has opened anything."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(step_sequences, *arguments, **options).result()


def assert_the_same(shown: ShownSequence, taken: dict[str, Any]) -> None:
    for name, column in (("clean", "clean"), ("noised", "noised"), ("log_snr", "log_snr")):
        assert [getattr(token, name) for token in shown.tokens] == taken[column]
    if not all(taken["is_noisy"]):
        assert [token.state != "given" for token in shown.tokens] == taken["is_noisy"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_they_are_those_of_the_run_before_and_after_it_has_run(runs, tmp_path, name, step):
    config, taken = runs[name]
    elsewhere = config.model_copy(update={"output_dir": str(tmp_path)})
    sizes = config.sizes
    for described in (config, elsewhere):
        found = step_sequences(described, step, sequences=0)
        samples = [shown.sample for shown in found.sequences]
        assert samples == list(range(sizes.samples_before(step - 1), sizes.samples_before(step)))
        assert (found.first_sample, found.in_step, found.steps) == (samples[0], len(samples), STEPS)
        for shown in found.sequences:
            assert_the_same(shown, taken[shown.sample])
    assert len(step_sequences(elsewhere, step, sequences=3).sequences) == 3
    assert not any(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize("name", ["one_rank", "next_token"])
def test_sources_and_documents_are_where_the_files_have_them(runs, sources, name):
    """Every token is the one at its document and position, by a search of the test's own."""
    config, _ = runs[name]
    readers = {path: IndexedReader(path) for path in sources}
    borders = {
        path: [0, *accumulate(reader.document(i).size for i in range(reader.num_documents))]
        for path, reader in readers.items()
    }
    seen = set()
    for shown in step_sequences(config, 5, sequences=0).sequences:
        path = shown.origin.prefix
        seen.add((shown.key, path))
        assert path.endswith(f"/{shown.source}")
        text = [token for token in shown.tokens if not token.is_inserted]
        first = borders[path][shown.origin.document] + shown.origin.within
        assert [token.clean for token in text] == readers[path].tokens(first, len(text)).tolist()
        for place, token in enumerate(text):
            document = np.searchsorted(borders[path], first + place, side="right") - 1
            assert token.document == document
            assert token.begins_document == (borders[path][document] == first + place)
    assert seen == {("data.train[0]", sources[0]), ("data.train[1]", sources[1])}


def test_inserted_pads_and_states_are_told_apart(runs):
    config, taken = runs["one_rank"]
    pads = states = 0
    for step in range(1, STEPS + 1):
        for shown in step_sequences(config, step, sequences=0).sequences:
            there = taken[shown.sample]
            inserted = [place for place, token in enumerate(shown.tokens) if token.is_inserted]
            assert inserted == [place for place, token in enumerate(there["clean"]) if token == 2]
            for place, token in enumerate(shown.tokens):
                if not there["is_noisy"][place]:
                    wanted = "given"
                elif there["noised"][place] == 3:
                    wanted = "masked"
                else:
                    wanted = "kept" if there["noised"][place] == there["clean"][place] else "changed"
                assert token.state == wanted
                states += wanted == "changed"
            pads += len(inserted)
    assert min(pads, states) > 20


def test_tokens_with_a_loss_are_those_that_the_step_counts(runs):
    """Under masked noise, where only masks count; elsewhere every position that is not noise-free."""
    for shown in step_sequences(runs["pp2_masked"][0], 2, sequences=0).sequences:
        assert [token.has_loss for token in shown.tokens] == [token.noised == 3 for token in shown.tokens]
    for shown in step_sequences(runs["one_rank"][0], 2, sequences=0).sequences:
        assert [token.has_loss for token in shown.tokens] == [token.state != "given" for token in shown.tokens]


def test_after_a_change_of_sources_past_and_coming_steps_are_right(sources, tmp_path):
    """Three steps on a, three on a and b, and three that are still to come, then cut to one rank."""
    first = toy_config(sources[0], tmp_path, name="run", **{**ONE, "schedule__steps": 3})
    both = {"data__train": sources, "schedule__steps": 6}
    second = toy_config(sources[0], tmp_path, name="run", **{**ONE, **both})
    third = toy_config(sources[0], tmp_path, name="run", **{**ONE, **both, "schedule__steps": 9})
    taken = on_ranks(1, taken_on_rank, [first], 1)[0][0]
    options = ResumeOptions(allow_data=True)
    with pytest.raises(CheckpointError, match="--allow-data-change"):
        step_sequences(second, 5, sequences=0)
    foreseen = step_sequences(second, 5, sequences=0, options=options)
    taken |= on_ranks(1, taken_on_rank, [second], 1, options)[0][0]
    coming = step_sequences(third, 8, sequences=0)
    taken |= on_ranks(1, taken_on_rank, [third], 1)[0][0]
    past = [step_sequences(third, 5, sequences=0), step_sequences(first, 2, sequences=0)]
    for found in (foreseen, coming, *past):
        assert found.remarks
        for shown in found.sequences:
            assert_the_same(shown, taken[shown.sample])
    with pytest.raises(CheckpointError, match="was trained with training data in step 2 of fingerprint"):
        step_sequences(third, 2, sequences=0)


def test_a_description_of_another_run_is_refused(runs):
    config, _ = runs["one_rank"]
    other = config.model_copy(update={"seed": 4})
    for step in (2, 5):
        with pytest.raises(CheckpointError, match=r"belongs to another run; .*seed: 3 -> 4"):
            step_sequences(other, step, sequences=1)
    assert step_sequences(other, 2, sequences=1, options=ResumeOptions(allowed=["seed"])).sequences


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_that_the_run_does_not_have_is_refused(runs, step):
    config, _ = runs["one_rank"]
    with pytest.raises(
        ConfigError, match=rf"--step {step}: the run one_rank has the steps 1 to 6 \(schedule.steps = 6"
    ):
        step_sequences(config, step, sequences=1)


def test_borders_of_documents_are_found_in_any_span(tmp_path):
    lengths = [3, 1, 1, 40, 2]
    reader = IndexedReader(write_indexed(tmp_path / "p", [[9] * length for length in lengths]))
    starts = [0, *accumulate(lengths)][:-1]
    for token in range(sum(lengths)):
        for count in range(1, sum(lengths) - token + 1):
            inside = [(s - token, i) for i, s in enumerate(starts) if token < s < token + count]
            holding = max(i for i, s in enumerate(starts) if s <= token)
            assert list(document_borders(reader, token, count)) == [(0, holding), *inside]


def test_it_loads_no_megatron(tmp_path):
    import subprocess
    import sys

    from tests.support.commands import REPOSITORY, write_yaml
    from tests.support.runs import toy_tree

    corpus = write_corpus(tmp_path / "corpus")
    description = write_yaml(tmp_path / "run.yaml", toy_tree(corpus, tmp_path))
    code = (
        "import sys; from megadiff.cli import inspect_data\n"
        f"sys.argv = ['inspect_data', '--config', {str(description)!r}, '--step', '2']; inspect_data.main()\n"
        "print('megatron' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "False"
