"""One training run on a real two-node Slurm, interrupted in seven ways, ends on the curve of an undisturbed run.

Each test waits until the run has taken some steps, disturbs it, and waits for the attempt that follows. They share the
run, so that each costs one start and not two; any interruption can be tested alone. Every name in it is hostile, so
that no other run has to be trained for that.
"""

from __future__ import annotations

import signal

import pytest

from tests.slurm.local_cluster import wait_for
from tests.slurm.training import (
    HOSTILE,
    Training,
    canaries,
    copy_of_the_commands,
    curve_of,
    job_facts,
    wait_for_end,
    wait_for_state,
)
from tests.support.commands import write_yaml
from tests.support.ranks import on_ranks
from tests.support.runs import RunConfig, toy_tree, train_on_rank

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

EVERY, LEAD_S = 3, 100


@pytest.fixture(scope="module")
def tree(toy_corpus, tmp_path_factory):
    """A small model and, so that a fault can be aimed at a step, a large batch.

    Slurm looks at time limits every 30 s, so how many steps all this takes is not known before: the learning rate is
    constant, and the last start is given an end that is near.
    """
    return toy_tree(
        toy_corpus,
        tmp_path_factory.mktemp("faults"),
        model__layers=2,
        schedule={"steps": 5000, "warmup_steps": 2, "decay_steps": 0},
        batch__global_batch_size=64,
        checkpoint__every=EVERY,
        data__valid=[],
        watchdog={"step_s": 15, "save_s": 15},
        stop__grace_period_s=20,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return copy_of_the_commands(tmp_path_factory.mktemp("home") / f"a {HOSTILE}", site="MEGADIFF_RANKS_PER_NODE=1\n")


@pytest.fixture(scope="module")
def launch_folder(tmp_path_factory):
    """Return the folder of the user and the description; the runs are below it."""
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def training(cluster, tree, home, launch_folder):
    output = launch_folder / "out\n$(touch CANARY) 100% %j"
    config = write_yaml(launch_folder / f"- {HOSTILE}.yaml", tree).name
    command = (
        "pretrain", "--config", config, "--nodes=2", "--time=30", f"--lead={LEAD_S}", f"name={HOSTILE}",
        f"output_dir={output}",
    )  # fmt: skip
    training = Training(cluster, output / HOSTILE, command, home)
    training.submit(cwd=launch_folder)
    yield training
    cluster.call("scancel", training.job, check=False)


def check_resumed(training: Training, *, after: int) -> None:
    """The present attempt went on after that step or a later one, and there is one line for each step so far."""
    assert training.resumed_after() >= after, training.log()
    training.wait_for_steps(EVERY)
    steps = [line["step"] for line in training.lines]
    assert steps == list(range(1, len(steps) + 1))


def last_complete(step: int) -> int:
    """The step whose checkpoint is complete for certain at this one: the newest may still be on its way."""
    return max(0, step // EVERY * EVERY - EVERY)


def test_the_time_limit_is_near(training, cluster):
    """Slurm sends USR2 ahead of the limit; no step that was taken is lost."""
    training.wait_for_steps(EVERY)
    cluster.call("scontrol", "update", f"JobId={training.job}", "TimeLimit=2")
    wait_for(lambda: training.status["state"] == "stopped", f"the stop: {training.log()}", timeout_s=500)
    stopped = training.status
    assert "USR2" in stopped["reason"], stopped
    wait_for_state(cluster, training.job, "PENDING", timeout_s=300)
    cluster.call("scontrol", "update", f"JobId={training.job}", "TimeLimit=30")

    training.wait_for_restart()

    check_resumed(training, after=stopped["step"])


def test_the_job_is_preempted(training, cluster):
    """TERM, and a grace time in which the job ends by itself: only the script can put it back into the queue."""
    training.wait_for_steps(EVERY)
    cluster.call("sbatch", "-p", "urgent", "-N2", "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 1")
    wait_for(lambda: training.status["state"] == "stopped", f"the stop: {training.log()}", timeout_s=300)
    stopped = training.status
    assert "TERM" in stopped["reason"], stopped

    training.wait_for_restart()

    check_resumed(training, after=stopped["step"])


def test_the_job_is_put_back_into_the_queue(training, cluster):
    step = training.wait_for_steps(EVERY)
    cluster.call("scontrol", "requeue", training.job)

    training.wait_for_restart()

    assert "the scheduler has put this job back into the queue" in training.batch_log()
    check_resumed(training, after=last_complete(step))


def test_a_rank_is_killed(training):
    step = training.wait_for_steps(EVERY)
    training.rank(1).kill()

    training.wait_for_restart()

    check_resumed(training, after=last_complete(step))


def test_a_rank_hangs(training):
    """A stopped process answers no signal but KILL; the watchdog ends the run, in a step or in a save."""
    step = training.wait_for_steps(EVERY)
    training.rank(1).send_signal(signal.SIGSTOP)

    training.wait_for_restart()

    check_resumed(training, after=last_complete(step))


def test_a_node_is_lost(training, cluster):
    """The job waits in the queue until the node is back."""
    step = training.wait_for_steps(EVERY)
    cluster.lose_node(cluster.nodes[1])
    wait_for_state(cluster, training.job, "PENDING", timeout_s=450)
    cluster.start_node(cluster.nodes[1])

    training.wait_for_restart()

    check_resumed(training, after=last_complete(step))


def test_the_user_cancels(training, cluster, launch_folder):
    """A cancelled job stays cancelled; the same command goes on where it was saved."""
    training.wait_for_steps(EVERY)
    restarts = job_facts(cluster, training.job)["Restarts"]
    cluster.call("scancel", training.job)
    facts = wait_for_end(cluster, training.job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", restarts)
    assert "this job was cancelled" in training.batch_log()
    stopped = training.status
    assert stopped["state"] == "stopped", stopped

    training.submit(f"schedule.steps={stopped['step'] + 3 * EVERY}", cwd=launch_folder)
    training.wait_until_running()

    check_resumed(training, after=stopped["step"])


def test_the_run_ends_on_the_undisturbed_curve(training, tree, cluster):
    """Bit for bit, against the same two ranks without a scheduler and without a break."""
    facts = wait_for_end(cluster, training.job)
    status = training.status
    whole = {**tree, "name": "whole", "schedule": {**tree["schedule"], "steps": status["steps"]}}
    undisturbed = on_ranks(2, train_on_rank, RunConfig.model_validate(whole), 2)[0]

    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), training.log()
    assert status["state"] == "finished"
    assert "the run is finished" in training.batch_log()
    assert curve_of(training.lines) == curve_of(undisturbed.lines)


def test_hostile_names_stay_names(training, home, launch_folder, cluster):
    """Quotes, substitutions, newlines and the patterns of sbatch in every name there is: trained, nothing executed."""
    facts = wait_for_end(cluster, training.job)

    assert facts["ExitCode"] == "0:0", training.log()
    names = {path.name for path in (training.folder / "slurm").iterdir()}
    attempts = [f"{training.job}.{number}" for number in range(int(facts["Restarts"]) + 1)]
    assert {name for name in names if name.startswith(f"{training.job}.")} == {
        f"{training.job}.out",
        f"{training.job}.attempts.jsonl",
        f"{attempts[0]}.preflight.log",
        *(f"{attempt}.node{node}.log" for attempt in attempts for node in (0, 1)),
    }
    assert {name.split(".")[0] for name in names} == set(training.jobs)
    assert not canaries(cluster, launch_folder, home)
