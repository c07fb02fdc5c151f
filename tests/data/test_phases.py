"""Mixtures that are planned by step: the same bits as changes by hand, on any layout and after any resumption."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from megadiff.checkpoint.manifest import read_manifest
from megadiff.data.mixture import next_mixture
from megadiff.data.open import OpenData, open_data
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.errors import CheckpointError, DataError
from megadiff.metric_lines import read_metrics
from megadiff.run.resume import ResumeOptions
from megadiff.run.step_sequences import step_sequences
from tests.data.corpora import write_indexed
from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import merged_sequences, toy_config, toy_tree, train_until, wire_on_rank

pytestmark = pytest.mark.timeout(900)

L = 16
SIZES = {"a": 40, "b": 24, "c": 9}
BATCH, STEPS = 8, 9
LATER = [(3, ["a", ("b", 3)]), (6, ["c", "b"])]
"""Phases after the first, which reads a alone: from step, sources with weights."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    draw = np.random.default_rng(3)
    return {
        name: str(write_indexed(folder / name, [draw.integers(4, 260, size=L * size).tolist()]))
        for name, size in SIZES.items()
    }


def entries(paths, names) -> list[Any]:
    return [paths[n] if isinstance(n, str) else {"path": paths[n[0]], "weight": n[1]} for n in names]


def planned(paths, later=LATER) -> dict[str, Any]:
    phases = [{"from_step": step, "train": entries(paths, names)} for step, names in later]
    return {"data__train": [paths["a"]], **({"data__phases": phases} if phases else {})}


def config_of(paths, output, **dotted):
    options = {"data__valid": [], "checkpoint__every": 2, "checkpoint__keep": 0, "schedule__steps": STEPS, **dotted}
    return toy_config(paths["a"], output, model__layers=2, model__hidden=16, **options)


def opened(paths, tmp_path, **dotted) -> OpenData:
    config = config_of(paths, tmp_path, **dotted)
    return open_data(
        config.data,
        ByteTokenizer(),
        seq_length=L,
        seed=config.seed,
        valid_sequences=1,
        samples_before=config.sizes.samples_before,
        samples=config.samples,
    )


def by_hand(paths, tmp_path) -> OpenData:
    """The data of each phase on its own, continued from where the one before it had got to."""
    data = opened(paths, tmp_path, data__train=[paths["a"]])
    yield data
    for step, names in LATER:
        at = step * BATCH
        alone = opened(paths, tmp_path, data__train=entries(paths, names))
        data = alone.continued(next_mixture(data.mixture_at(at), alone.identities, first_sample=at))
        yield data


def test_planned_phases_are_the_changes_made_by_hand(paths, tmp_path):
    plan = opened(paths, tmp_path, **planned(paths))
    ends = [step * BATCH for step, _ in LATER] + [STEPS * BATCH]
    first = 0
    for place, (data, end) in enumerate(zip(by_hand(paths, tmp_path), ends, strict=True)):
        samples = list(range(first, end))
        assert np.array_equal(plan.sequences(samples), data.train.sequences(samples))
        assert plan.at(first) is plan.phases[place]
        assert plan.at(first).fingerprint == data.fingerprint
        for sample in (first, end - 1):
            assert plan.mixture_at(sample) == data.mixture_at(sample)
        assert plan.epochs_at(end) == data.epochs_at(end)
        first = end
    order = np.random.default_rng(0).permutation(first).tolist()
    assert np.array_equal(plan.sequences(order), plan.sequences(range(first))[order])


def test_no_sequence_repeats_before_its_source_is_through(paths, tmp_path):
    """24 samples of a, then 6 of 24 of a, and b from its own next sequence in the third phase."""
    plan = opened(paths, tmp_path, **planned(paths))
    given = {name: [] for name in SIZES}
    for sample in range(STEPS * BATCH):
        origin = plan.at(sample).train.origin(sample)
        given[origin.prefix.rpartition("/")[2]].append(origin.token // L)
    assert {name: len(numbers) for name, numbers in given.items()} == {"a": 30, "b": 35, "c": 7}
    for name, numbers in given.items():
        for start in range(0, len(numbers), SIZES[name]):
            epoch = numbers[start : start + SIZES[name]]
            assert len(set(epoch)) == len(epoch)
    assert [(source.label, drawn) for source, drawn in plan.drawn_at(STEPS * BATCH)] == [("a", 30), ("b", 35), ("c", 7)]


def trained(config, ranks, *, until=STEPS):
    """Train from where the run stands; what each sample was."""
    return merged_sequences(on_ranks(ranks, train_until, config, ranks, until))


LAYOUTS = [(2, {"parallel__tensor": 2}), (2, {"batch__micro_batch_size": 4, "parallel__distributed_optimizer": True})]


@pytest.fixture(scope="module")
def whole(paths, tmp_path_factory):
    config = config_of(paths, tmp_path_factory.mktemp("whole"), name="whole", **planned(paths))
    return config, trained(config, 1)


CUTS = (2, 3, 4, 6)


@pytest.fixture(scope="module")
def cut_runs(paths, tmp_path_factory):
    """One run on one rank, cut before, at and after each border: the finished run, what each part was, and a copy of
    the run's folder by cut."""
    root = tmp_path_factory.mktemp("cut")
    config = config_of(paths, root, name="cut", **planned(paths))
    parts, copies = {}, {}
    for cut in CUTS:
        parts[cut] = trained(config, 1, until=cut)
        copies[cut] = shutil.copytree(config.folder, root / f"copies-{cut}" / "cut")
    parts[STEPS] = trained(config, 1)
    return config, parts, copies


def test_a_run_cut_at_every_border_goes_on_bit_for_bit(whole, cut_runs):
    config, parts, _ = cut_runs
    assert {end: sorted(taken) for end, taken in parts.items()} == {
        end: list(range(start * BATCH, end * BATCH)) for start, end in zip((0, *CUTS), (*CUTS, STEPS), strict=True)
    }
    assert {sample: digest for taken in parts.values() for sample, digest in taken.items()} == whole[1]
    lines = [
        [
            [line[key] for key in ("step", "loss", "grad_norm", "epochs")]
            for line in read_metrics(run.folder / "metrics.jsonl")
        ]
        for run in (config, whole[0])
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("cut", CUTS)
def test_a_run_cut_before_at_and_after_a_border_goes_on_elsewhere(paths, whole, cut_runs, cut):
    """It reads the same sequences on two other layouts."""
    _, _, copies = cut_runs
    ranks, layout = LAYOUTS[cut % 2]
    elsewhere = config_of(paths, copies[cut].parent, name="cut", **planned(paths), **layout)
    assert trained(elsewhere, ranks) == {sample: digest for sample, digest in whole[1].items() if sample >= cut * BATCH}


def test_a_plan_may_be_added_at_its_border(paths, whole, tmp_path):
    """Three steps on a alone; then the rest by a change at the border, allowed by hand or planned since."""
    first = config_of(paths, tmp_path, name="run", **planned(paths, []), checkpoint__every=3)
    taken = trained(first, 1, until=3)
    changed = config_of(paths, tmp_path, name="run", data__train=entries(paths, LATER[0][1]))
    with pytest.raises(AssertionError, match="--allow-data-change"):
        on_ranks(1, wire_on_rank, changed, 1)
    added = config_of(paths, tmp_path, name="run", **planned(paths))
    assert taken | trained(added, 1) == whole[1]


def test_a_phase_added_in_the_past_needs_permission(paths, tmp_path):
    first = config_of(paths, tmp_path, name="run", **planned(paths, []))
    trained(first, 1, until=4)
    added = config_of(paths, tmp_path, name="run", **planned(paths))
    with pytest.raises(CheckpointError, match="--allow-data-change"):
        step_sequences(added, 6, sequences=1)
    assert step_sequences(added, 6, sequences=1, options=ResumeOptions(allow_data=True)).sequences


@pytest.mark.parametrize("step", [2, 3, 4, 6, 7, 9])
def test_steps_of_every_phase_are_shown_before_and_after(paths, whole, tmp_path, step):
    config, _ = whole
    anywhere = config.model_copy(update={"output_dir": str(tmp_path)})
    past, new = step_sequences(config, step, sequences=0), step_sequences(anywhere, step, sequences=0)
    assert past.sequences == new.sequences
    wanted = ["data.train", "data.phases[0].train", "data.phases[1].train"][(step > 3) + (step > 6)]
    assert {shown.key.rpartition("[")[0] for shown in new.sequences} == {wanted}


def test_checkpoints_hold_the_phase_of_the_next_step(paths, whole, tmp_path):
    config, _ = whole
    plan = opened(paths, tmp_path, **planned(paths))
    for step in (2, 6, 8):
        saved = read_manifest(config.folder / f"checkpoints/step_{step:08d}")
        assert saved.data_fingerprint == plan.at(step * BATCH).fingerprint
        assert saved.mixture == plan.mixture_at(step * BATCH).model_dump(mode="json")


def test_the_check_prints_what_every_phase_reads(paths, tmp_path):
    dotted = {"model__layers": 1, "schedule__steps": STEPS, "schedule__warmup_steps": 1, **planned(paths)}
    description = write_yaml(tmp_path / "run.yaml", toy_tree(paths["a"], tmp_path, **dotted))
    ended = call_forked("pretrain_dlm.py", "--config", description, "--check")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("data              "))
    assert [" ".join(line.split()) for line in lines[start : start + 9]] == [
        "data 1,168 tokens to train on in 3 sources and 3 phases: 0.99 epochs at the end",
        "phase from step 0 on, 24 samples to come, shared by size",
        "data.train[0] a: 640 tokens, 40 sequences, share 100.00%, 0.60 epochs at its end",
        "phase from step 3 on, 24 samples to come, shared by weight",
        "data.phases[0].train[0] a: 640 tokens, 40 sequences, share 25.00%, 0.60 epochs so far, 0.75 epochs at its end",
        "data.phases[0].train[1] b: 384 tokens, 24 sequences, share 75.00%, 0.00 epochs so far, 0.75 epochs at its end",
        "phase from step 6 on, 24 samples to come, shared by size",
        "data.phases[1].train[0] c: 144 tokens, 9 sequences, share 27.27%, 0.00 epochs so far, 0.78 epochs at the end",
        "data.phases[1].train[1] b: 384 tokens, 24 sequences, share 72.73%, 0.75 epochs so far, 1.46 epochs at the end",
    ]
    assert "data.phases[0].train[0] has no weight beside sources that do, and counts as weight 1" in ended.out


@pytest.mark.parametrize(
    ("later", "sentence"),
    [
        ([(3, ["a"]), (3, ["b"])], r"data.phases\[1\].from_step is 3, not above 3 of the phase before it"),
        ([(9, ["b"])], r"data.phases\[0\].from_step is 9, but the run ends after 9 steps \(schedule.steps = 9\)"),
        ([(0, ["b"])], "greater than 0"),
        ([(2, [])], "at least 1 item"),
    ],
)
def test_phases_that_cannot_be_are_refused(paths, tmp_path, later, sentence):
    with pytest.raises(ValidationError, match=sentence):
        config_of(paths, tmp_path, **planned(paths, later))


BUDGETS = [{"path": "b", "epochs": 2}, {"path": "c", "tokens": 5 * L}, "a"]
"""48 sequences of b and 5 of c in 72; the other 19 are a's."""


def with_paths(paths, sources):
    return [paths[one] if isinstance(one, str) else {**one, "path": paths[one["path"]]} for one in sources]


def drawn(data, end=STEPS * BATCH):
    return {source.label: number for source, number in data.drawn_at(end)}


def test_budgets_are_met_exactly_and_evenly(paths, tmp_path):
    data = opened(paths, tmp_path, data__train=with_paths(paths, BUDGETS))
    assert drawn(data) == {"b": 48, "c": 5, "a": 19}
    given = [data.train.place(sample).source for sample in range(STEPS * BATCH)]
    assert [given.count(source) for source in range(3)] == [48, 5, 19]
    for start in range(0, STEPS * BATCH, 18):
        assert [abs(given[start : start + 18].count(0) - 12), given[start : start + 18].count(1)] <= [2, 3]


@pytest.mark.parametrize(
    ("sources", "wanted"),
    [
        (
            [{"path": "b", "epochs": 0.5}, {"path": "a", "weight": 1}, {"path": "c", "weight": 3}],
            {"b": 12, "a": 15, "c": 45},
        ),
        ([{"path": "b", "epochs": 1}, "a", "c"], {"b": 24, "a": 39, "c": 9}),
        ([{"path": "a", "tokens": 36 * L}, {"path": "b", "epochs": 1.5}], {"a": 36, "b": 36}),
        ([{"path": "b", "epochs": 1}, {"path": "b", "epochs": 1}, "a"], {"b": 48, "a": 24}),
    ],
)
def test_the_rest_is_shared_by_weight_or_by_size(paths, tmp_path, sources, wanted):
    assert drawn(opened(paths, tmp_path, data__train=with_paths(paths, sources))) == wanted


def test_a_budget_of_a_phase_counts_what_was_read_before(paths, tmp_path):
    """a gives 24 in three steps; b one epoch by step 6; then a reaches one epoch, and c gives what is left."""
    phases = [
        {"from_step": 3, "train": with_paths(paths, [{"path": "b", "epochs": 0.5}, "c"])},
        {"from_step": 6, "train": with_paths(paths, [{"path": "a", "epochs": 1}, {"path": "b", "epochs": 0.75}, "c"])},
    ]
    data = opened(paths, tmp_path, data__train=[paths["a"]], data__phases=phases)
    assert drawn(data, 3 * BATCH) == {"a": 24}
    assert drawn(data, 6 * BATCH) == {"a": 24, "b": 12, "c": 12}
    assert drawn(data) == {"a": 40, "b": 18, "c": 14}


@pytest.fixture(scope="module")
def budgeted(paths, tmp_path_factory):
    """Settings of a run with budgets, and what each sample of the whole run was."""
    phases = [{"from_step": 5, "train": with_paths(paths, [{"path": "b", "epochs": 2}, "c"])}]
    budgets = {"data__train": with_paths(paths, BUDGETS[:1] + BUDGETS[2:]), "data__phases": phases}
    budgets["data__train"][0]["epochs"] = 1
    return budgets, trained(config_of(paths, tmp_path_factory.mktemp("budgets"), name="run", **budgets), 1)


@pytest.mark.parametrize("cut", [2, 5])
def test_a_run_with_budgets_goes_on_bit_for_bit_and_may_be_made_longer(paths, budgeted, tmp_path, cut):
    budgets, wanted = budgeted
    parts = config_of(paths, tmp_path, name="run", **budgets)
    taken = trained(parts, 1, until=cut)
    ranks, layout = LAYOUTS[cut % 2]
    elsewhere = config_of(paths, tmp_path, name="run", **budgets, **layout)
    longer = config_of(paths, tmp_path, name="run", **{**budgets, "schedule__steps": STEPS + 3})
    if cut == 5:
        with pytest.raises(CheckpointError, match="--allow-data-change"):
            step_sequences(longer, 6, sequences=1)
        found = step_sequences(longer, 12, sequences=0, options=ResumeOptions(allow_data=True))
        numbers = [shown.number for shown in found.sequences if shown.source == "b"]
        assert max(numbers) in range(45, 48), "two epochs of 24 at the later end"
    assert taken | trained(elsewhere, ranks) == wanted


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (
            [{"path": "a", "epochs": 2}, "b"],
            r"take 80 sequences \(data.train\[0\] 80\) of the 72 .*leaves 0 to 1 other",
        ),
        ([{"path": "a", "epochs": 1}], r"take 40 sequences .*, but 72 come until sample 72; leave one source without"),
        ([{"path": "a", "tokens": 3}, "b"], r"data.train\[0\]: the budget is less than half a sequence of 16 tokens"),
        (
            [{"path": "a", "epochs": 1}, "a", "b"],
            r"data.train\[0\] and data.train\[1\] hold the same text, and not all",
        ),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(paths, tmp_path, sources, sentence):
    with pytest.raises(DataError, match=sentence):
        opened(paths, tmp_path, data__train=with_paths(paths, sources))


def test_a_source_has_a_weight_or_a_budget(paths, tmp_path):
    with pytest.raises(ValidationError, match="has weight and epochs; give one of weight, epochs and tokens"):
        config_of(paths, tmp_path, data__train=[{"path": paths["a"], "epochs": 1, "weight": 2}])
