"""The shipped batch scripts under a real Slurm: what they refuse, give up, pass on and leave alone."""

from __future__ import annotations

import json

import pytest

from megadiff.metric_lines import read_metrics
from megadiff.run.sweep_folder import plan_sweep, states, write_sweep
from tests.slurm.local_cluster import wait_for
from tests.slurm.training import (
    HOSTILE,
    START_S,
    canaries,
    copy_of_the_commands,
    job_facts,
    submit,
    wait_for_end,
    wait_until_gone,
)
from tests.support.commands import write_yaml
from tests.support.runs import toy_tree
from tests.support.sweeps import content_of, run_pool, write_description

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

CPU = "MEGADIFF_RANKS_PER_NODE=1\n"
NAME = "the folder's $(touch CANARY) %j"
REQUEUED, SECOND, DIVERGED = (
    "masked-L1-D16-b8-lr0.002-s0", "masked-L1-D32-b8-lr0.002-s0", "masked-L1-D32-b8-lr1e+30-s0",
)  # fmt: skip
GRID = [
    {"sequences": [8], "learning_rates": [0.002], "shapes": ["1x16x2", "1x32x2"]},
    {"sequences": [8], "learning_rates": [1e30], "shapes": ["1x32x2"]},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return copy_of_the_commands(tmp_path_factory.mktemp("home") / f"a {HOSTILE}", site=CPU)


@pytest.fixture(scope="module")
def tree(toy_corpus, tmp_path_factory):
    return toy_tree(
        toy_corpus, tmp_path_factory.mktemp("jobs"), model__layers=2, data__valid=[], stop__grace_period_s=20
    )


@pytest.fixture(scope="module", autouse=True)
def doomed(cluster, tree, tmp_path_factory):
    """A run whose container cannot be started, and its job; its attempts go by while other tests run."""
    folder = tmp_path_factory.mktemp("doomed")
    home = copy_of_the_commands(folder / "home", site=CPU + "MEGADIFF_CONTAINER=(false)\n")
    config = write_yaml(folder / "run.yaml", {**tree, "output_dir": str(folder)})
    return folder / "toy", submit(cluster, home, "pretrain", "--config", config, "--nodes=2", "--time=30")


def written(folder, corpus):
    """The folder of a sweep of three runs, two of which can finish."""
    base = {"checkpoint": {"every": 50}, "optimizer__clip_grad": 0.0, "stop__grace_period_s": 20}
    description = write_description(folder, corpus, base=base, budgets={"flops": [4e7, 1.2e9]}, grid=GRID)
    plan = plan_sweep(description)
    write_sweep(plan)
    return plan.folder


def test_a_users_mistake_ends_the_job_before_it_trains(cluster, home, tree, tmp_path):
    """The data are not there: the check on the batch host refuses with code 2, and nothing is started again."""
    config = write_yaml(tmp_path / "run.yaml", {**tree, "output_dir": str(tmp_path / "runs")})
    # Submitted from inside another job, which was started again itself: nothing of that is this job's.
    outer = {
        "SLURM_RESTART_COUNT": "7",
        "SLURM_JOB_END_TIME": "1",
        "SLURM_ARRAY_JOB_ID": "9",
        "SLURM_ARRAY_TASK_ID": "1",
    }
    job = submit(
        cluster, home, "pretrain", "--config", config, "--nodes=2", "--time=30", "data.train=[/no/such/data]", env=outer
    )

    facts = wait_for_end(cluster, job)

    logs = tmp_path / "runs/toy/slurm"
    log = (logs / f"{job}.out").read_text()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert "error: " in log
    assert "/no/such/data" in log
    assert "Traceback" not in log
    assert not list(logs.glob("*.node*.log")), "no rank was started"


def test_a_node_has_as_many_ranks_as_it_has_gpus(cluster, tree, tmp_path):
    """What would be run in a container is printed by `echo` in its place."""
    home = copy_of_the_commands(tmp_path / "home", site="MEGADIFF_CONTAINER=(echo)\n")
    config = write_yaml(tmp_path / "run.yaml", {**tree, "output_dir": str(tmp_path / "runs")})
    job = submit(
        cluster, home, "pretrain", "--config", config, "--nodes=2", "--gpus-per-node=3", "--time=30",
        "--max-restarts=0",
    )  # fmt: skip

    facts = wait_for_end(cluster, job)

    logs = tmp_path / "runs/toy/slurm"
    log = (logs / f"{job}.out").read_text()
    assert facts["ExitCode"] == "93:0", "no status.json: a crash, and no restart is allowed"
    assert "2 nodes, 3 ranks each" in log
    assert "--check --ranks 6" in (logs / f"{job}.0.preflight.log").read_text()
    assert log.count(f"bash {home}/slurm/node.sh {home} {logs}/{job}.0 --config={config}") == 2


def test_a_sweep_with_a_failed_and_a_requeued_task(cluster, home, toy_corpus, tmp_path):
    """Each row trains its run, whatever happens to another one, and a job may wait for one of them."""
    folder = written(tmp_path / NAME, toy_corpus)
    rows = folder / "rows.txt"
    assert "'eval.at_flops=[" in rows.read_text(), "one setting has a space"
    job = submit(cluster, home, "sweep", "--config", folder / "base.yaml", "--rows", rows, "--time=30", "--at-once=3")
    (folder / "runs" / SECOND).mkdir(parents=True, exist_ok=True)  # its task may have begun, or not yet
    evaluation = submit(
        cluster, home, "evaluate", "--model", folder / "runs" / SECOND, "--data", toy_corpus, "--time=10",
        f"--dependency=afterok:{job}_1", "--", "--sequences=4", "--noise-levels=2", "--output", tmp_path / "elbo.json",
    )  # fmt: skip
    run = folder / "runs" / REQUEUED

    def has_begun() -> bool:
        return any(line["step"] > 75 for line in read_metrics(run / "metrics.jsonl"))

    wait_for(has_begun, f"the steps of {REQUEUED}", timeout_s=START_S)
    cluster.call("scontrol", "requeue", f"{job}_0")
    wait_until_gone(cluster, job, evaluation, timeout_s=2 * START_S)

    found = {each.name: each for each in states(folder)}
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("runs/*/slurm/*.out"))
    assert {name: each.state for name, each in found.items()} == {
        REQUEUED: "finished", SECOND: "finished", DIVERGED: "diverged",
    }, logs  # fmt: skip
    assert all(found[name].step == found[name].steps for name in (REQUEUED, SECOND)), found
    assert found[REQUEUED].steps != found[SECOND].steps
    assert len(list((run / "slurm").glob("*.attempts.jsonl"))) == 1
    assert {path.name.split(".")[1] for path in (run / "slurm").glob("*.node0.log")} == {"0", "1"}, "two attempts"
    assert job_facts(cluster, evaluation)["JobState"] == "COMPLETED", logs
    assert json.loads((tmp_path / "elbo.json").read_text())["step"] == found[SECOND].steps
    assert not canaries(cluster, tmp_path, home)

    here = written(tmp_path / "here", toy_corpus)
    for name in (SECOND, DIVERGED):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "status.json").write_text((run.parent / name / "status.json").read_text())
    run_pool(here)
    assert content_of(run)["figures"] == content_of(here / "runs" / REQUEUED)["figures"]


def test_converting_says_when_this_version_cannot(cluster, tmp_path):
    home = copy_of_the_commands(tmp_path / "home", site="")
    (home / "tools").unlink()
    (tmp_path / "run").mkdir()
    job = submit(cluster, home, "convert", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out", "--time=5")

    facts = wait_for_end(cluster, job)

    log = (tmp_path / f"slurm/{job}.out").read_text()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    assert log == (
        f"error: {home}/tools/convert_checkpoint.py does not exist in this version, so no checkpoint can be converted\n"
    )


def test_cpu_ranks_must_be_counted_by_the_site(cluster, tree, tmp_path):
    home = copy_of_the_commands(tmp_path / "home", site="")
    config = write_yaml(tmp_path / "run.yaml", {**tree, "output_dir": str(tmp_path / "runs")})
    job = submit(cluster, home, "pretrain", "--config", config, "--time=30")

    assert wait_for_end(cluster, job)["ExitCode"] == "2:0"
    assert "MEGADIFF_RANKS_PER_NODE in slurm/site.env must say" in (tmp_path / f"runs/toy/slurm/{job}.out").read_text()
    assert job_facts(cluster, job)["Restarts"] == "0"


def test_a_run_that_never_gets_anywhere_is_given_up_after_three_restarts(cluster, doomed):
    run, job = doomed

    facts = wait_for_end(cluster, job)

    log = (run / f"slurm/{job}.out").read_text()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "93:0", "3"), log
    assert "3 restarts without a newer checkpoint than none: given up" in log
    assert [f"attempt {number} of job {job}" in log for number in range(5)] == [True] * 4 + [False]
