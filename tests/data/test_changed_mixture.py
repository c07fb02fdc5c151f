"""Runs whose mixture changes, by the real commands and on real ranks: positions, messages, replay, branches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadiff.checkpoint.manifest import read_manifest
from megadiff.data.indexed_reader import IndexedReader
from megadiff.data.mixture import Mixture
from megadiff.metric_lines import read_metrics
from megadiff.run.resume import ResumeOptions
from tests.data.corpora import write_indexed
from tests.support.commands import write_yaml
from tests.support.forked_command import Ended, call_forked
from tests.support.ranks import on_ranks
from tests.support.runs import toy_config, toy_tree, wire_on_rank

pytestmark = pytest.mark.timeout(1800)

L = 16
SEQUENCES = {"a": 64, "b": 32, "c": 20, "big": 5687, "small": 57}


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    draw = np.random.default_rng(5)
    found = {}
    for name, sequences in SEQUENCES.items():
        ids = draw.integers(4, 260, size=sequences * L + (11 if name == "big" else 0)).tolist()
        found[name] = str(write_indexed(folder / name, [ids[i : i + 37] for i in range(0, len(ids), 37)]))
    return found


@pytest.fixture(scope="module")
def whereabouts(paths) -> dict[bytes, tuple[str, int]]:
    """{a sequence's tokens: (source, its place in the file)}, read without the code that draws."""
    found = {}
    for name, sequences in SEQUENCES.items():
        tokens = IndexedReader(paths[name]).tokens(0, sequences * L).reshape(sequences, L)
        found |= {tokens[place].tobytes(): (name, place) for place in range(sequences)}
    assert len(found) == sum(SEQUENCES.values())
    return found


def tree(paths: dict[str, str], output: Path, train_on: list[Any], steps: int, **dotted: Any) -> dict[str, Any]:
    entries = [
        paths[entry] if isinstance(entry, str) else {"path": paths[entry[0]], "weight": entry[1]} for entry in train_on
    ]
    options = {
        "model__layers": 1,
        "model__hidden": 16,
        "data__valid": [],
        "checkpoint__every": 4,
        "checkpoint__keep": 0,
    }
    options |= {"schedule__steps": steps, "schedule__warmup_steps": 1, "schedule__decay_steps": 0, **dotted}
    return toy_tree(Path(paths["a"]), output, data__train=entries, **options)


def pretrain(paths: dict[str, str], output: Path, train_on: list[Any], steps: int, *flags: str, **dotted: Any) -> Ended:
    description = write_yaml(output / "run.yaml", tree(paths, output, train_on, steps, **dotted))
    return call_forked("pretrain_dlm.py", "--config", description, *flags)


def mixture_of(run: Path, step: int) -> Mixture:
    return Mixture.model_validate(read_manifest(run / "checkpoints" / f"step_{step:08d}").mixture)


def positions(mixture: Mixture) -> list[tuple[str, str, int, int]]:
    return [(Path(p.path).name, p.name, p.start, p.drawn) for p in mixture.sources]


def test_a_second_stage_goes_on_in_the_first_source_and_says_what_changes(paths, tmp_path):
    """32 of a's 64 sequences, then a and b by size: by hand, 2/3 of 48 are a's, 1/3 are b's."""
    run = tmp_path / "toy"
    assert pretrain(paths, tmp_path, ["a"], 4).code == 0
    refused = pretrain(paths, tmp_path, ["a", "b"], 10)
    assert (refused.code, "--allow-data-change" in refused.err) == (2, True)
    foreseen = pretrain(paths, tmp_path, ["a", "b"], 10, "--allow-data-change", "--check")
    changed = pretrain(paths, tmp_path, ["a", "b"], 10, "--allow-data-change")
    assert (foreseen.code, changed.code) == (0, 0), foreseen.err + changed.err
    for out in (foreseen.out, changed.out):
        assert "data changed      at sample 32: every source continues at its own next sequence" in out
        assert "a: 32 sequences of 64 seen (0.50 epochs); 32 to come, none of them a repeat (1.00 epochs at" in out
        assert (
            "b: new, none of its 32 sequences seen; 16 to come, none of them a repeat (0.50 epochs at the end)" in out
        )
    assert positions(mixture_of(run, 4)) == [("a", "train.0", 0, 32)]
    assert positions(mixture_of(run, 10)) == [("a", "train.0", 32, 64), ("b", "train.1", 0, 16)]
    epochs = {line["step"]: line["epochs"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}
    assert epochs[1] == {"a": 8 / 64}
    assert epochs[4] == {"a": 0.5}
    assert epochs[10] == {"a": 1.0, "b": 0.5}
    # An unchanged mixture needs no permission, and goes on where the change began.
    again = pretrain(paths, tmp_path, ["a", "b"], 12)
    assert again.code == 0, again.err
    assert "data changed" not in again.out
    assert mixture_of(run, 12).first_sample == 32
    shown = call_forked("tools/inspect_checkpoint.py", run)
    drawn = {name: count for name, _, _, count in positions(mixture_of(run, 12))}
    assert sum(drawn.values()) == 96
    assert f"b: {drawn['b']} sequences drawn" in shown.out


def test_what_will_repeat_after_a_change_is_a_warning(paths, tmp_path):
    assert pretrain(paths, tmp_path, [("a", 1), ("c", 1)], 4).code == 0
    ended = pretrain(paths, tmp_path, ["a"], 12, "--allow-data-change", "--check")
    assert ended.code == 0, ended.err
    assert (
        "a: 16 sequences of 64 seen (0.25 epochs); 64 to come, 16 of them a repeat (1.25 epochs at the end)"
        in ended.out
    )
    assert "c: 16 sequences of 20 seen (0.80 epochs); if it returns it continues from there" in ended.out
    assert (
        "warning           data.train[0] (a): 16 of the 64 sequences to come will have been seen before; lower"
        in ended.out
    )


def drawn_on_rank(config: Any, world_size: int, allow_data: bool) -> list[bytes]:
    """The clean sequences that this rank trains on, in its order."""
    run = wire_on_rank(config, world_size, ResumeOptions(allow_data=allow_data))
    found: list[bytes] = []

    def noted(sequences):
        for batch in sequences:
            found.extend(np.ascontiguousarray(sequence).tobytes() for sequence in batch.clean.numpy())
            yield batch

    run.microbatches = noted(run.microbatches)
    run.train()
    # The loader is ahead of the steps, but only what a step took has passed here.
    return found


def test_no_sequence_of_an_unfinished_epoch_is_seen_twice_on_any_layout(paths, whereabouts, tmp_path):
    """a; then a and b; then b and c with the weights 1:3, on two layouts by turns."""
    layouts: dict[str, tuple[int, dict[str, Any]]] = {"one": (1, {}), "tp2_dp2": (4, {"parallel__tensor": 2})}
    mixed, other = ["a", "b"], [("b", 1), ("c", 3)]
    stages = [(["a"], 4, "one"), (mixed, 8, "tp2_dp2"), (mixed, 10, "one"), (other, 13, "tp2_dp2")]
    seen: list[tuple[str, int]] = []
    for train_on, steps, layout in stages:
        ranks, options = layouts[layout]
        dotted = {"schedule__steps": steps, "schedule__warmup_steps": 1, "schedule__decay_steps": 0, **options}
        described = tree(paths, tmp_path, train_on, steps)["data"]["train"]
        config = toy_config(
            Path(paths["a"]), tmp_path, data__train=described, data__valid=[], checkpoint__keep=0, **dotted
        )
        by_rank = on_ranks(ranks, drawn_on_rank, config, ranks, True)
        if ranks == 4:  # tensor ranks are neighbours: 0 and 1 share their sequences, as do 2 and 3
            assert by_rank[0] == by_rank[1]
            assert by_rank[2] == by_rank[3]
        found = [sequence for rank in range(0, ranks, 2) for sequence in by_rank[rank]]
        seen += [whereabouts[sequence] for sequence in found]
        reached = mixture_of(tmp_path / "toy", steps)
        counts = Counter(name for name, _ in seen)
        assert {Path(p.path).name: p.drawn for p in (*reached.sources, *reached.removed)} == dict(counts)
    assert len(seen) == 13 * 8
    assert max(Counter(seen).values()) == 1
    # 32 of a alone; 48 of a and b as 2:1; 24 of b and c as 1:3.
    counts = Counter(name for name, _ in seen)
    assert counts["a"] == 64
    assert abs(counts["b"] - 16 - 6) <= 2
    assert counts["b"] + counts["c"] == 40


def test_unequal_sources_without_weights_come_to_the_same_epochs(paths, tmp_path):
    """91,003 and 912 tokens and 300 steps of 8: by hand 2400 / 5744 epochs of each."""
    ended = pretrain(paths, tmp_path, ["big", "small"], 300, "--check")
    assert ended.code == 0, ended.err
    assert "91,915 tokens to train on in 2 sources, shared by size: 0.42 epochs at the end" in ended.out
    assert "big: 91,003 tokens, 5,687 sequences, share 99.01%, 0.42 epochs at the end" in ended.out
    assert "small: 912 tokens, 57 sequences, share 0.99%, 0.42 epochs at the end" in ended.out
    assert "warning           data.train" not in ended.out
    ended = pretrain(paths, tmp_path, [("big", 1), ("small", 1)], 300, "--check")
    assert "small: 912 tokens, 57 sequences, share 50.00%, 21.05 epochs at the end" in ended.out
    assert (
        "warning           data.train[1] (small) is gone through 21.1 times by the end, data.train[0] (big) 0.21"
        in ended.out
    )


@pytest.fixture(scope="module")
def two_stages(paths, tmp_path_factory) -> Path:
    """A run of 4 steps on a and 6 more on a and b, with a checkpoint after step 4, 8 and 10."""
    output = tmp_path_factory.mktemp("stages")
    assert pretrain(paths, output, ["a"], 4).code == 0
    ended = pretrain(paths, output, ["a", "b"], 10, "--allow-data-change")
    assert ended.code == 0, ended.err
    return output / "toy"


def replayed(run: Path, step: int, output: Path, *overrides: str) -> tuple[Ended, list[bytes]]:
    saved = output / f"step_{step}.npz"
    ended = call_forked("tools/replay.py", "--run", run, "--step", str(step), "--save", saved, *overrides)
    if ended.code:
        return ended, []
    with np.load(saved, allow_pickle=False) as found:
        return ended, [sequence.astype(np.int64).tobytes() for sequence in found["clean"]]


def test_steps_around_a_change_are_replayed_with_their_own_sequences(two_stages, paths, whereabouts, tmp_path):
    lines = {line["step"]: line for line in read_metrics(two_stages / "metrics.jsonl") if "loss" in line}
    seen: list[tuple[str, int]] = []
    for step, overrides in ((3, [f"data.train=[{paths['a']}]"]), (5, []), (9, [])):
        ended, sequences = replayed(two_stages, step, tmp_path, *overrides)
        assert ended.code == 0, ended.err
        assert f"({lines[step]['loss']} was logged, relative difference 0.0e+00)" in ended.out
        seen += [whereabouts[sequence] for sequence in sequences]
    assert len(set(seen)) == 24
    assert {name for name, _ in seen[:8]} == {"a"}
    assert {name for name, _ in seen[8:]} == {"a", "b"}


def test_a_step_is_not_replayed_with_data_it_did_not_have(two_stages, paths, tmp_path):
    for step, overrides in ((3, []), (6, [f"data.train=[{paths['a']}]"])):
        ended, _ = replayed(two_stages, step, tmp_path, *overrides)
        assert ended.code == 2
        assert f"was trained with training data in step {step} of fingerprint" in ended.err
        assert len(ended.err.splitlines()) == 1


def test_a_branch_on_another_mixture_goes_on_in_every_source(two_stages, paths, tmp_path):
    """The usual cooldown on better text: from the trunk's step 8, on b and c."""
    description = write_yaml(tmp_path / "run.yaml", tree(paths, tmp_path, ["b", "c"], 10))
    command = (
        "tools/branch_cooldowns.py",
        "--config",
        description,
        "--trunk",
        two_stages / "checkpoints/step_00000008",
    )
    ended = call_forked(
        *command, "--lengths", "2", "--dry-run", "--allow-data-change", "--set", f"output_dir={tmp_path}"
    )
    assert ended.out.rstrip().endswith("toy-cooldown-2/branch.yaml --allow-data-change"), ended.err
    words = ended.out.split("--config", 1)[1].split()
    ended = call_forked("pretrain_dlm.py", "--config", *words)
    assert ended.code == 0, ended.err
    trunk, branch = mixture_of(two_stages, 8), mixture_of(tmp_path / "toy-cooldown-2", 10)
    assert [p.start for p in branch.sources] == [trunk.sources[1].drawn, 0]
    assert [(Path(p.path).name, p.drawn) for p in branch.removed] == [("a", trunk.sources[0].drawn)]
