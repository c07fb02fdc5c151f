"""A written sweep as an array of the real scheduler: one task fails, and one is put back into the queue."""

from __future__ import annotations

import pytest

from megadiff.metric_lines import read_metrics
from megadiff.run.sweep_folder import plan_sweep, states, write_sweep
from tests.slurm.local_cluster import wait_for
from tests.slurm.training import START_S, copy_of_the_commands, submit
from tests.support.sweeps import content_of, run_pool, write_description

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

REQUEUED, SECOND, DIVERGED = (
    "masked-L1-D16-b8-lr0.002-s0", "masked-L2-D16-b8-lr0.002-s0", "masked-L1-D32-b8-lr1e+30-s0",
)  # fmt: skip
GRID = [
    {"sequences": [8], "learning_rates": [0.002], "shapes": ["1x16x2", "2x16x2"]},
    {"sequences": [8], "learning_rates": [1e30], "shapes": ["1x32x2"]},
]


def written(folder, corpus):
    base = {"checkpoint": {"every": 50}, "optimizer__clip_grad": 0.0, "stop__grace_period_s": 20}
    description = write_description(folder, corpus, base=base, budgets={"flops": [4e7, 2e9]}, grid=GRID)
    plan = plan_sweep(description)
    write_sweep(plan)
    return plan.folder


def test_an_array_with_a_failed_and_a_requeued_task(cluster, toy_corpus, tmp_path):
    folder = written(tmp_path / "sweep", toy_corpus)
    home = copy_of_the_commands(tmp_path / "home", site="MEGADIFF_RANKS_PER_NODE=1\n")
    job = submit(
        cluster, home, "sweep", "--config", folder / "base.yaml", "--rows", folder / "rows.txt", "--time=30",
        "--at-once=3",
    )  # fmt: skip
    run = folder / "runs" / REQUEUED

    def has_begun() -> bool:
        return any(line["step"] > 75 for line in read_metrics(run / "metrics.jsonl"))

    wait_for(has_begun, f"the steps of {REQUEUED}", timeout_s=START_S)
    cluster.call("scontrol", "requeue", f"{job}_0")
    wait_for(
        lambda: not cluster.call("squeue", "-h", "-j", job, check=False).strip(), "the array", timeout_s=2 * START_S
    )

    found = {each.name: each for each in states(folder)}
    logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("runs/*/slurm/*.out"))
    assert {name: each.state for name, each in found.items()} == {
        REQUEUED: "finished", SECOND: "finished", DIVERGED: "diverged",
    }, logs  # fmt: skip
    assert len(list((run / "slurm").glob("*.attempts.jsonl"))) == 1
    assert {path.name.split(".")[1] for path in (run / "slurm").glob("*.node0.log")} == {"0", "1"}, "two attempts"

    here = written(tmp_path / "here", toy_corpus)
    for name in (SECOND, DIVERGED):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "status.json").write_text((run.parent / name / "status.json").read_text())
    run_pool(here)
    assert content_of(run)["figures"] == content_of(here / "runs" / REQUEUED)["figures"]
