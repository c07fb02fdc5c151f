"""The local pool trains every run once, whatever happens to its workers, and to itself."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megadiff.run import sweep_pool
from megadiff.run.sweep_folder import RunState, plan_sweep, states, write_sweep
from tests.support.runs import read_metrics
from tests.support.sweeps import ForkedProcess, content_of, fork_worker, run_pool, said, start_pool, write_description

KILLS = int(os.environ.get("MEGADIFF_SWEEP_KILLS", "3"))
"""Number of times that the pool is killed; `MEGADIFF_SWEEP_KILLS=20` makes it a harder test."""
NAME = "masked-L{}-D{}-b8-lr0.002-s0"


def written(folder: Path, corpus: Path, **changes) -> Path:
    """A sweep's folder."""
    plan = plan_sweep(write_description(folder, corpus, **changes))
    write_sweep(plan)
    return plan.folder


def by_name(folder: Path) -> dict[str, RunState]:
    return {state.name: state for state in states(folder)}


def contents(folder: Path) -> dict[str, dict[str, object]]:
    """All that counts of every run, with the sweep's own path cut out of the settings."""
    found = {run.name: content_of(run) for run in sorted((folder / "runs").iterdir())}
    return {name: {**each, "config": each["config"].replace(str(folder), "")} for name, each in found.items()}


def wait_for(condition: Callable[[], object], folder: Path, *, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, said(folder)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(toy_corpus, tmp_path_factory) -> Path:
    """A sweep that one worker has trained in one go, and a cooldown of one of its runs."""
    folder = written(
        tmp_path_factory.mktemp("undisturbed"), toy_corpus, cooldowns=[{"shapes": ["1x32x2"], "length": 0.4}]
    )
    run_pool(folder)
    return folder


def test_every_run_is_finished_at_its_last_budget(undisturbed):
    found = by_name(undisturbed)
    branch = f"{NAME.format(1, 32)}-cooldown0.4"
    assert {name: (each.state, each.step) for name, each in found.items()} == {
        NAME.format(1, 16): ("finished", 29),
        NAME.format(2, 16): ("finished", 15),
        NAME.format(1, 32): ("finished", 8),
        branch: ("finished", 8),
    }
    evaluated = [
        line["step"] for line in content_of(undisturbed / "runs" / NAME.format(1, 16))["figures"] if "eval_elbo" in line
    ]
    assert evaluated == [0, 15, 29]
    cooled = [line for line in content_of(undisturbed / "runs" / branch)["figures"] if "loss" in line]
    assert [line["step"] for line in cooled] == [6, 7, 8]
    assert cooled[0]["lr"] == 0.002 > cooled[1]["lr"] > cooled[2]["lr"] > 0


def test_a_run_after_others_is_the_run_alone(undisturbed, toy_corpus, tmp_path):
    """The last run of the warm worker, beside one that a fresh worker has trained first and alone."""
    folder = written(
        tmp_path, toy_corpus, sizes={"shapes": ["1x32x2"]}, cooldowns=[{"shapes": ["1x32x2"], "length": 0.4}]
    )
    run_pool(folder)
    alone, after = contents(folder), contents(undisturbed)
    assert list(alone) == [NAME.format(1, 32), f"{NAME.format(1, 32)}-cooldown0.4"]
    for name, content in alone.items():
        assert content == after[name]


def test_a_killed_pool_goes_on_bit_for_bit(undisturbed, toy_corpus, tmp_path):
    folder = written(tmp_path, toy_corpus, cooldowns=[{"shapes": ["1x32x2"], "length": 0.4}])
    draw, kills = random.Random(0), 0
    while kills < KILLS:
        pool = start_pool(folder, jobs=2)
        pool.join(draw.uniform(0.3, 3.0))
        if not pool.is_alive():
            (folder / "runs" / draw.choice(sorted(by_name(folder)))).rename(tmp_path / f"removed-{kills}")
        pool.kill()
        pool.join()
        kills += 1
    run_pool(folder, jobs=2)
    assert {state.state for state in states(folder)} == {"finished"}
    assert contents(folder) == contents(undisturbed)
    assert "error" not in said(folder)


def test_a_worker_is_replaced_after_many_runs(toy_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_pool, "_MOST_RUNS", 1)
    folder = written(tmp_path, toy_corpus, sizes={"shapes": ["1x32x2"]}, seeds=[0, 1])
    started = tmp_path / "started"

    def start(*words):
        with started.open("a") as file:
            file.write("one\n")
        return fork_worker(*words)

    pool = start_pool(folder, start=start)
    pool.join(100)
    assert pool.exitcode == 0, said(folder)
    assert started.read_text().count("one") == 2
    assert {state.state for state in states(folder)} == {"finished"}


def test_finished_runs_are_not_repeated(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "runs").rglob("metrics.jsonl")}
    shown = run_pool(undisturbed)
    assert before == {path: path.stat().st_mtime_ns for path in (undisturbed / "runs").rglob("metrics.jsonl")}
    assert shown.count("finished after step") == len(before)


def test_a_killed_and_a_diverged_run_do_not_stop_the_others(toy_corpus, tmp_path):
    """One worker is killed in its run, and one run has a rate that no loss survives."""
    grid = [
        {"sequences": [8], "learning_rates": [0.002]},
        {"sequences": [8], "learning_rates": [1e30], "shapes": ["1x32x2"]},
    ]
    folder = written(tmp_path, toy_corpus, grid=grid, base={"optimizer__clip_grad": 0.0})
    process = start_pool(folder)
    first = folder / "runs" / NAME.format(1, 16)
    wait_for(lambda: read_metrics(first / "metrics.jsonl"), folder)
    worker = next(child for child in psutil.Process(process.pid).children() if child.name() != "watcher")
    worker.kill()
    process.join(100)
    found = by_name(folder)
    diverged = "masked-L1-D32-b8-lr1e+30-s0"
    assert {name: each.state for name, each in found.items()} == {
        NAME.format(1, 16): "failed",
        NAME.format(2, 16): "finished",
        NAME.format(1, 32): "finished",
        diverged: "diverged",
    }
    assert f"{NAME.format(1, 16)} failed: its worker ended (killed by SIGKILL)" in said(folder)
    assert f"{diverged} diverged: " in said(folder)
    assert process.exitcode == 1

    again = run_pool(folder)

    assert by_name(folder)[NAME.format(1, 16)].state == "finished"
    assert again.count(diverged) == 1, "a run that diverged is not tried again"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pool_that_is_asked_to_stop_saves_its_runs(toy_corpus, tmp_path, number):
    folder = written(tmp_path, toy_corpus, budgets={"flops": [4e7, 8e9]}, base={"checkpoint": {"every": 100000}})
    pool = start_pool(folder, jobs=1)
    run = folder / "runs" / NAME.format(1, 16)
    wait_for(lambda: read_metrics(run / "metrics.jsonl"), folder)
    os.kill(pool.pid, number)
    pool.join(60)
    assert pool.exitcode == 130, said(folder)
    stopped = by_name(folder)[NAME.format(1, 16)]
    assert (stopped.state, stopped.reason) == ("stopped", number.name)
    assert (run / "checkpoints" / f"step_{stopped.step:08d}").is_dir()
    assert by_name(folder)[NAME.format(1, 32)].state == "missing"


def test_a_second_pool_on_a_folder_is_refused(toy_corpus, tmp_path):
    folder = written(tmp_path, toy_corpus, budgets={"flops": [4e7, 8e9]})
    first = start_pool(folder)
    wait_for((folder / "runs").exists, folder)
    second = start_pool(folder)
    second.join(60)
    first.kill()
    first.join()
    assert second.exitcode == 2
    assert f"error: another pool (pid {first.pid} on " in said(folder)


def test_a_mistake_that_all_runs_share_ends_the_pool(toy_corpus, tmp_path):
    folder = written(tmp_path, toy_corpus, base={"data__train": [str(tmp_path / "nothing")]}, seeds=[0, 1])
    shown = run_pool(folder)
    assert shown.count(" failed: ") == 3
    assert "3 runs end with the same mistake, so no more are started" in shown


def dead_worker() -> ForkedProcess:
    """A worker that has ended before it could begin."""
    pid = os.fork()
    if not pid:
        os._exit(3)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return ForkedProcess(pid)


def has_begun(folder: Path) -> bool:
    """Whether any run has taken a step."""
    return any(read_metrics(path) for path in (folder / "runs").glob("*/metrics.jsonl"))


def test_workers_that_do_not_start_are_said_to(toy_corpus, tmp_path):
    folder = written(tmp_path, toy_corpus)
    pool = start_pool(folder, start=lambda *words: dead_worker())
    pool.join(30)
    assert pool.exitcode == 1
    assert "error: a worker ended before its first run (exit code 3); " in said(folder)


def test_runs_save_themselves_when_the_first_worker_does_not_start(toy_corpus, tmp_path):
    """The pool hears of the dead worker before the news that another one has begun."""
    folder = written(tmp_path, toy_corpus, budgets={"flops": [4e7, 8e9]}, base={"checkpoint": {"every": 100000}})

    def start(number, *words):
        if number == 2:
            wait_for(lambda: has_begun(folder), folder)
        return fork_worker(number, *words) if number == 1 else dead_worker()

    pool = start_pool(folder, jobs=3, start=start)
    pool.join(60)
    assert pool.exitcode == 1, said(folder)
    assert "error: a worker ended before its first run (exit code 3); " in said(folder)
    (saved,) = [state for state in states(folder) if state.state != "missing"]
    assert (saved.state, saved.reason) == ("stopped", "SIGTERM")
    assert (folder / "runs" / saved.name / "checkpoints" / f"step_{saved.step:08d}").is_dir()


def test_a_worker_that_dies_before_its_run_is_replaced(toy_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_pool, "_MOST_RUNS", 1)
    folder = written(tmp_path, toy_corpus, sizes={"shapes": ["1x32x2"]}, seeds=[0, 1])
    started = []

    def start(*words):
        started.append(words)
        return dead_worker() if len(started) in (2, 3) else fork_worker(*words)

    pool = start_pool(folder, start=start)
    pool.join(100)
    assert pool.exitcode == 0, said(folder)
    assert said(folder).count(f"(exit code 3); {NAME.format(1, 32)[:-1]}1 waits for another one") == 2
    assert {state.state for state in states(folder)} == {"finished"}


def test_a_run_that_no_worker_begins_is_named(toy_corpus, tmp_path, monkeypatch):
    """Workers begin nothing once the first has trained; after three such runs the pool gives up."""
    monkeypatch.setattr(sweep_pool, "_MOST_RUNS", 1)
    folder = written(tmp_path, toy_corpus, sizes={"shapes": ["1x32x2"]}, seeds=[0, 1, 2, 3, 4])
    started = []

    def start(*words):
        started.append(words)
        return dead_worker() if len(started) > 1 else fork_worker(*words)

    pool = start_pool(folder, start=start)
    pool.join(100)
    assert pool.exitcode == 1, said(folder)
    assert said(folder).count(" failed: 3 workers ended before they began it (exit code 3); ") == 3
    assert "3 runs end with the same mistake, so no more are started" in said(folder)
    assert [state.state for state in states(folder)].count("finished") == 1


def test_a_signal_while_workers_start_is_heeded(toy_corpus, tmp_path):
    folder = written(tmp_path, toy_corpus, budgets={"flops": [4e7, 8e9]}, base={"checkpoint": {"every": 100000}})

    def start(number, *words):
        if number == 1:
            wait_for(lambda: has_begun(folder), folder)
            os.kill(os.getpid(), signal.SIGINT)
        return fork_worker(number, *words)

    pool = start_pool(folder, jobs=3, start=start)
    pool.join(60)
    assert pool.exitcode == 130, said(folder)
    assert said(folder).count("SIGINT: the runs save themselves; again to leave at once") == 1
    assert sorted(state.state for state in states(folder)) == ["missing", "missing", "stopped"]


def test_branches_of_diverged_runs_are_left_out(toy_corpus, tmp_path):
    folder = written(
        tmp_path,
        toy_corpus,
        base={"optimizer__clip_grad": 0.0},
        sizes={"shapes": ["1x32x2"]},
        grid=[{"sequences": [8], "learning_rates": [1e30]}],
        cooldowns=[{"shapes": ["1x32x2"], "length": 0.4}],
    )
    for code in (1, 0):
        pool = start_pool(folder)
        pool.join(60)
        assert pool.exitcode == code, said(folder)
    assert said(folder).count("1 branch of a diverged trunk is left out") == 2
    assert "not finished" not in said(folder)
    assert [state.state for state in states(folder)] == ["diverged", "missing"]
