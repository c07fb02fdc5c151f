"""Cooldowns branch from a finished run as its user trained it, and what cannot be is said with what there is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from megadiff.checkpoint.folder import step_folders
from megadiff.cli import branch_cooldowns
from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import read_metrics, toy_tree

STEPS, COOLDOWN, EVERY = 16, 8, 2


@pytest.fixture(scope="module")
def trunk(toy_corpus, tmp_path_factory):
    """A finished run with a cooldown, started with overrides that its file does not have; and the file."""
    folder = tmp_path_factory.mktemp("trunk")
    tree = toy_tree(
        toy_corpus,
        folder,
        name="trunk",
        model__layers=1,
        data__valid=[],
        schedule={"steps": STEPS, "warmup_steps": 2, "decay_steps": COOLDOWN},
        checkpoint={"every": EVERY},
        eval__at_steps=[9, 12],
        eval__at_flops=[1e8, 1.5e8],
    )
    path = write_yaml(folder / "trunk.yaml", tree)
    ended = call_forked("pretrain_dlm.py", "--config", path, "optimizer.lr=0.005", "noise.shift=masked")
    assert ended.code == 0, ended.err
    return folder / "trunk", path


def test_the_last_checkpoint_before_the_cooldown_is_kept(trunk):
    run, _ = trunk
    assert [folder.name for folder in step_folders(run)] == ["step_00000016", "step_00000014", "step_00000008"]


def test_a_branch_has_the_trunks_own_settings(trunk, tmp_path):
    run, path = trunk
    ended = call_forked(
        "tools/branch_cooldowns.py",
        *(
            "--config",
            path,
            "--trunk",
            run / "checkpoints/step_00000008",
            "--lengths",
            "3",
            "--set",
            f"output_dir={tmp_path}",
        ),
    )
    assert ended.code == 0, ended.err
    assert f"the trunk had optimizer.lr 0.005, {path} has 0.002; the trunk's is used" in ended.out
    branch = tmp_path / "trunk-cooldown-3"
    config = yaml.safe_load((branch / "config.yaml").read_text())
    assert (config["optimizer"]["lr"], config["noise"]["shift"]) == (0.005, "masked")
    assert (config["schedule"]["steps"], config["schedule"]["decay_steps"]) == (11, 3)
    reached = (config["eval"]["at_steps"], config["eval"]["at_flops"])
    assert reached == ([9], [1e8]), "evaluations behind the branch's end are left out"
    lines = read_metrics(branch / "metrics.jsonl")
    assert [line["step"] for line in lines] == [9, 10, 11]
    assert lines[0]["lr"] == 0.005
    assert lines[0]["loss"] == read_metrics(run / "metrics.jsonl")[8]["loss"], (
        "the step after the checkpoint is the same"
    )


def test_a_branch_takes_all_of_a_trunk_that_took_weights_alone(trunk, tmp_path):
    run, _ = trunk
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["checkpoint"] |= {"start_from": str(run / "checkpoints/step_00000014"), "weights_only": True}
    origin = run / "checkpoints/step_00000008"
    path = branch_cooldowns._write_settings(settings, origin, 8, [f"output_dir={tmp_path}"], 3)
    branch = yaml.safe_load(path.read_text())["checkpoint"]
    assert (branch["start_from"], branch["weights_only"]) == (str(origin), False)


def test_a_dry_run_prints_commands_that_can_be_run(trunk, tmp_path):
    run, _ = trunk
    ended = call_forked(
        "tools/branch_cooldowns.py",
        *("--trunk", run, "--lengths", "2", "3", "--dry-run", "--set", f"output_dir={tmp_path}"),
    )
    assert ended.code == 0, ended.err
    commands = [line for line in ended.out.splitlines() if line.startswith("$ ")]
    assert len(commands) == 2
    for command in commands:
        path = Path(command.split()[-1])
        said = call_forked("pretrain_dlm.py", "--config", path, "--check").out
        assert f"checkpoints/step_00000008 after step 8 of {8 + int(path.parent.name[-1])}" in said


def test_what_cannot_be_branched_from_is_said_with_what_there_is(trunk, tmp_path):
    run, _ = trunk

    def said(place, *more):
        ended = call_forked("tools/branch_cooldowns.py", "--trunk", place, "--lengths", "3", *more)
        assert ended.code == 2, ended.err
        assert len(ended.err.splitlines()) == 1
        return ended.err

    kept = f"checkpoints of {run} in its stable stretch: step_00000008"
    assert f"step_00000010 does not exist; {kept}" in said(run / "checkpoints/step_00000010")
    late = said(run / "checkpoints/step_00000014")
    assert f"step 14, outside its run's stable stretch of steps 2 to 8; {kept}" in late
    assert "holds no checkpoint; give a run folder" in said(tmp_path / "nothing/checkpoints/step_00000001")
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
    none = said(tmp_path / "run")
    assert "holds no checkpoint to branch from" in none
    assert "holds step_00000016, step_00000014, none of them in the stable stretch" in none


def test_an_installed_package_trains_branches_with_its_own_command(trunk, tmp_path, monkeypatch, capsys):
    """Only a checkout has pretrain_dlm.py above the package."""
    run, _ = trunk
    monkeypatch.setattr(branch_cooldowns, "__file__", str(tmp_path / "site-packages/megadiff/cli/branch_cooldowns.py"))
    words = [
        "--trunk",
        str(run),
        "--lengths",
        "3",
        "--launcher",
        "torchrun",
        "--dry-run",
        "--set",
        f"output_dir={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", ["megadiff branch_cooldowns", *words])
    branch_cooldowns.main()
    described = tmp_path / "trunk-cooldown-3/branch.yaml"
    assert f"$ torchrun -m megadiff train --config {described}\n" in capsys.readouterr().out
    assert described.is_file()
