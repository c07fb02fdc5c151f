"""The shipped batch scripts under a real Slurm: what they refuse, give up, pass on and leave alone."""

from __future__ import annotations

import json

import pytest

from tests.slurm.training import Training, copy_of_the_commands, job_facts, submit, submit_all, wait_for_end
from tests.support.commands import REPOSITORY, write_yaml
from tests.support.runs import toy_tree

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

HOSTILE = 'it\'s a "$(touch CANARY)" `touch CANARY` ${HOME} %j;touch CANARY& -x é'
CPU = "MEGADIFF_RANKS_PER_NODE=1\n"


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


def test_hostile_names_stay_names(cluster, home, tree, tmp_path):
    """Quotes, substitutions, newlines and the patterns of sbatch in every name there is: trained, nothing executed."""
    output = tmp_path / "out\n$(touch CANARY) 100% %j"
    config = tmp_path / f"- {HOSTILE}.yaml"
    write_yaml(config, {**tree, "schedule": {"steps": 6, "warmup_steps": 1}})
    training = Training(
        cluster,
        output / HOSTILE,
        ("pretrain", "--config", config.name, "--nodes=2", "--time=30", f"name={HOSTILE}", f"output_dir={output}"),
        home,
    )
    training.submit(cwd=tmp_path)

    facts = wait_for_end(cluster, training.job)

    assert facts["ExitCode"] == "0:0", training.log()
    assert training.status["state"] == "finished"
    assert [line["step"] for line in training.lines] == list(range(1, 7))
    names = {path.name for path in (output / HOSTILE / "slurm").iterdir()}
    attempt = f"{training.job}.0"
    assert names == {
        f"{training.job}.out",
        f"{training.job}.attempts.jsonl",
        f"{attempt}.preflight.log",
        f"{attempt}.node0.log",
        f"{attempt}.node1.log",
    }
    assert not [
        *tmp_path.rglob("CANARY"),
        *home.rglob("CANARY"),
        *REPOSITORY.glob("CANARY"),
        *cluster.folder.rglob("CANARY"),
    ]


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


def test_preprocessing_makes_shards_and_merges_them(cluster, home, tmp_path):
    files = [tmp_path / "-a.jsonl", tmp_path / "b $(touch CANARY).jsonl"]
    for file in files:
        file.write_text(json.dumps({"text": file.name}) + "\n")
    _, merging = submit_all(
        cluster, home, "preprocess", "--output-prefix", tmp_path / "data/a $(touch CANARY)", "--tokenizer=byte",
        "--time=5", "--tasks=2", "--input", *files, "--", "--append-eod",
    )  # fmt: skip

    facts = wait_for_end(cluster, merging)

    logs = "\n".join(path.read_text() for path in (tmp_path / "data").glob("slurm/*/*.out"))
    assert facts["JobState"] == "COMPLETED", logs
    manifest = json.loads((tmp_path / "data/a $(touch CANARY).json").read_text())
    assert manifest["tokens"] == sum(len(file.name) + 1 for file in files)
    assert not list(tmp_path.rglob("CANARY"))


def test_a_sweep_trains_a_run_for_each_row_and_a_run_can_be_evaluated(cluster, home, tree, toy_corpus, tmp_path):
    config = write_yaml(tmp_path / "run.yaml", {**tree, "output_dir": str(tmp_path / "runs")})
    rows = tmp_path / "rows.txt"
    rows.write_text("name='first one' schedule.steps=4\nname=second schedule.steps=5\n")
    sweep = submit(cluster, home, "sweep", "--config", config, "--rows", rows, "--time=30")
    measure = (
        "evaluate", "--model", tmp_path / "runs/second", "--data", toy_corpus, "--time=10",
        f"--dependency=afterok:{sweep}", "--", "--sequences=4", "--noise-levels=2", "--output", tmp_path / "elbo.json",
    )  # fmt: skip
    (tmp_path / "runs/second").mkdir(exist_ok=True)  # the sweep may have begun
    evaluation = submit(cluster, home, *measure)

    facts = wait_for_end(cluster, evaluation, timeout_s=1000)

    logs = "\n".join(path.read_text() for path in tmp_path.glob("runs/*/slurm/*.out"))
    assert facts["JobState"] == "COMPLETED", logs
    for name, steps in (("first one", 4), ("second", 5)):
        status = json.loads((tmp_path / "runs" / name / "status.json").read_text())
        assert (status["state"], status["step"]) == ("finished", steps)
    assert json.loads((tmp_path / "elbo.json").read_text())["step"] == 5


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
