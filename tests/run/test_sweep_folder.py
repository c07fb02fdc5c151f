"""A sweep's folder follows from its description; what it holds is neither changed nor mixed with another sweep."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from megadiff.config.load import load_config
from megadiff.data import indexed_format
from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig
from megadiff.run.sweep_folder import counts, plan_sweep, read_manifest, states, write_sweep
from megadiff.supervision.launch import Holder
from megadiff.supervision.status import FAILED, FINISHED, NO_RESTART, RUNNING, STOPPED, Status, write_status
from tests.support.sweeps import write_description

COOLDOWN = [{"shapes": ["1x32x2"], "length": 0.4}]


@pytest.fixture
def plan(toy_corpus, tmp_path):
    return plan_sweep(write_description(tmp_path, toy_corpus, noises=["masked", "next_token"], cooldowns=COOLDOWN))


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_same_description_writes_the_same_bytes(plan, tmp_path):
    new = write_sweep(plan)
    first = files(plan.folder)
    for path in list(plan.folder.rglob("*.yaml")):
        path.unlink()
    (plan.folder / "sweep.json").unlink()
    assert new == write_sweep(plan) == [run.name for run in plan.runs]
    assert files(plan.folder) == first
    assert write_sweep(plan) == []
    assert len(plan.runs) == 8


def test_a_row_and_a_description_are_the_same_run(plan):
    """`slurm/submit sweep` and the local pool train the same configurations."""
    write_sweep(plan)
    rows = [
        shlex.split(line)
        for name in ("rows.txt", "branches.txt")
        for line in (plan.folder / name).read_text().splitlines()
        if not line.startswith("#")
    ]
    assert len(rows) == len(plan.runs)
    for row in rows:
        config = load_config(plan.folder / "base.yaml", row, RunConfig)
        assert config == load_config(plan.folder / f"descriptions/{config.name}.yaml", [], RunConfig)
        assert config.folder == plan.folder / "runs" / config.name
        assert config.schedule.decay_steps == 0 or config.checkpoint.start_from is not None
    assert sum("checkpoint.start_from" in line for line in (plan.folder / "branches.txt").read_text().splitlines()) == 2


def test_branches_take_all_of_trunks_that_took_weights_alone(toy_corpus, tmp_path):
    plan = plan_sweep(
        write_description(tmp_path, toy_corpus, noises=["masked"], cooldowns=COOLDOWN),
        ["settings=[checkpoint.start_from=there, checkpoint.weights_only=true]"],
    )
    write_sweep(plan)
    found = [load_config(plan.folder / f"descriptions/{run.name}.yaml", [], RunConfig).checkpoint for run in plan.runs]
    assert [one.weights_only for one in found] == [run.trunk is None for run in plan.runs]
    assert {one.weights_only for one in found} == {True, False}


def test_runs_may_be_added_but_not_changed(plan, toy_corpus, tmp_path):
    write_sweep(plan)
    more = plan_sweep(plan.path, ["seeds=[0, 1]"])
    assert write_sweep(more) == [run.name for run in more.runs if run.seed == 1]
    with pytest.raises(
        ConfigError, match=r"holds the run masked-L1-D16-b8-lr0.002-s1, which .*sweep.yaml does not have"
    ):
        write_sweep(plan)
    run, base = r"the run masked-L1-D16-b8-lr0\.002-s0 with", "a sweep whose base run has"
    for settings, said in {
        "budgets.flops=[4e7, 9e7]": rf"{run} `budgets` \[40000000\.0, 80000000\.0\], while .*sweep\.yaml has \[4.*, 9",
        "noises=[{name: masked, settings: [noise.scale=0.5]}, next_token]": (
            rf"{run} `settings\.noise\.scale` null, while .*sweep\.yaml has 0\.5; give another --output, or the"
        ),
        "settings=[optimizer.weight_decay=0.2]": rf"{base} `optimizer\.weight_decay` 0\.1, while .*yaml has 0\.2;",
        "settings=[schedule.warmup_steps=1]": rf"{base} `schedule\.warmup_steps` 2, while .*yaml has 1;",
    }.items():
        with pytest.raises(ConfigError, match=said):
            write_sweep(plan_sweep(plan.path, ["seeds=[0, 1]", settings]))


def test_the_data_at_hand_are_counted_once_they_exist(plan, toy_corpus, tmp_path):
    size = indexed_format.read_manifest(Path(f"{toy_corpus}.json")).tokens
    many = [f"budgets.flops=[4e7, {2 * size * 1e5:g}]", "noises=[masked]", "cooldowns=[]"]
    (said,) = [text for text in plan_sweep(plan.path, many).expansion.remarks if "data.train" in text]
    assert said.endswith(f" times, {2 * size * 1e5:.3g} FLOPs in 3 runs")
    assert not any("data.train" in text for text in plan.expansion.remarks)
    missing = plan_sweep(plan.path, [*many, f"settings=['data.train=[{tmp_path}/none]']"])
    assert not any("data.train" in text for text in missing.expansion.remarks)
    twice = plan_sweep(plan.path, [*many, f"settings=['data.train=[{{path: {toy_corpus}, weight: 3}}, {toy_corpus}]']"])
    assert any("data.train" in text for text in twice.expansion.remarks)


def test_a_sweep_written_by_an_older_version_goes_on(plan):
    """Its manifest records nothing of the schedule."""
    write_sweep(plan)
    path = plan.folder / "sweep.json"
    manifest = json.loads(path.read_text())
    assert "steps" not in manifest["base"].pop("schedule")
    path.write_text(json.dumps(manifest))
    assert write_sweep(plan) == []
    assert "schedule" in json.loads(path.read_text())["base"]


@pytest.mark.parametrize("key", ["checkpoint.weights_only", "model.alignment", "method", "model.seq_length"])
def test_a_key_that_came_later_has_its_default_in_an_older_sweep(plan, key):
    write_sweep(plan)
    path = plan.folder / "sweep.json"
    manifest = json.loads(path.read_text())
    section, _, name = key.rpartition(".")
    del (manifest["base"][section] if section else manifest["base"])[name]
    path.write_text(json.dumps(manifest))
    if key == "model.seq_length":  # which has no default
        with pytest.raises(ConfigError, match=r"base run has `model\.seq_length` null"):
            write_sweep(plan)
    else:
        assert write_sweep(plan) == []


def test_a_description_of_the_other_kind_is_recognised(plan):
    base = plan.path.parent / "base.yaml"
    with pytest.raises(ConfigError, match=r"base\.yaml: this is the description of a run, not of a sweep; .* as `run`"):
        plan_sweep(base)
    with pytest.raises(ConfigError, match=r"sweep\.yaml: this is the description of a sweep, not of a run; `megadiff"):
        load_config(plan.path, [], RunConfig)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["noises=[{name: masked, settings: [name=b]}]"], "name and output_dir are the sweep's"),
        (["settings=[optimizer.lrr=1]"], "unknown key `optimizer.lrr`"),
        (["run=nothing.yaml"], "nothing.yaml: the run description does not exist"),
        (["laws=nothing.yaml"], "nothing.yaml: the law file does not exist"),
        (
            ["noises=[{name: masked, settings: [model.layers=x]}]"],
            "masked-L1-D16-b8-lr0.002-s0: .*`model.layers` wants",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(plan, overrides, said):
    with pytest.raises(ConfigError, match=said):
        write_sweep(plan_sweep(plan.path, overrides))
    assert not (plan.folder / "sweep.json").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "base": {}, "runs": [{"name": "../x"}]}']
)
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ConfigError, match="write the sweep again"):
        read_manifest(tmp_path)


def test_another_folder_is_no_sweep(tmp_path):
    with pytest.raises(ConfigError, match=r"is no folder of a sweep: it has no sweep.json"):
        states(tmp_path)


def test_states_are_read_from_the_run_folders(plan):
    """One run in each state that a kill, a loss, a stop, a process of another machine, or nothing leaves behind."""
    write_sweep(plan)
    names = [run.name for run in plan.runs]
    wanted = {
        names[0]: ("finished", Status.now(FINISHED, step=plan.runs[0].steps, steps=plan.runs[0].steps)),
        names[1]: ("diverged", Status.now(NO_RESTART, step=3, steps=15, reason="the loss is nan", exit_code=5)),
        names[2]: ("failed", Status.now(FAILED, step=3, steps=8, reason="no space", exit_code=1)),
        names[3]: ("interrupted", Status.now(RUNNING, step=4, steps=8)),
        names[4]: ("running", Status.now(RUNNING, step=4, steps=29)),
        names[5]: ("stopped", Status.now(STOPPED, step=4, steps=15, reason="SIGTERM")),
        names[6]: ("missing", None),
        names[7]: ("stopped", Status.now(FINISHED, step=2, steps=2)),
    }
    for name, (_, status) in wanted.items():
        if status is not None:
            folder = plan.folder / "runs" / name
            folder.mkdir(parents=True)
            write_status(folder, status)
    Holder.this_process().write(plan.folder / "runs" / names[4])
    (plan.folder / "runs" / names[4] / "metrics.jsonl").write_text(
        json.dumps({"step": 7, "elbo": 5.5}) + "\n" + json.dumps({"step": 7, "eval_elbo": 5.25}) + '\n{"step": 8, "el'
    )
    found = {each.name: each for each in states(plan.folder)}
    assert {name: each.state for name, each in found.items()} == {name: state for name, (state, _) in wanted.items()}
    assert (found[names[4]].step, found[names[4]].loss) == (7, 5.25)
    assert found[names[1]].reason == "the loss is nan"
    assert counts(found.values()) == "1 finished, 1 running, 2 stopped, 1 interrupted, 1 failed, 1 diverged, 1 missing"
