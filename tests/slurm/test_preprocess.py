"""A corpus that several nodes make in shards, whose tasks are killed, preempted, stopped and put back meanwhile."""

from __future__ import annotations

import contextlib
import json
import random
import signal
from pathlib import Path

import psutil
import pytest

from tests.data.shards.corpus import contents, write_serial
from tests.slurm.local_cluster import LocalCluster, wait_for
from tests.slurm.training import (
    HOSTILE,
    START_S,
    canaries,
    copy_of_the_commands,
    job_facts,
    submit_all,
    wait_for_end,
    wait_until_gone,
)

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def write_corpus(folder: Path, documents: int) -> Path:
    draw = random.Random(4)
    lines = (json.dumps({"text": " ".join(draw.choices(["née", "fox", "數", "and"], k=200))}) for _ in range(documents))
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder / "corpus.jsonl"


def commands(node: str) -> list[psutil.Process]:
    """Return the processes that make shards on a node."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            words = process.info["cmdline"] or []
            is_ours = process.environ().get("SLURMD_NODENAME") == node
            if is_ours and any(word.endswith("preprocess_data.py") for word in words) and "srun" not in words[0]:
                found.append(process)
    return found


def shards_done(folder: Path) -> int:
    return len([path for path in (folder / "shards").glob("[0-9]*")])


def restarts(cluster: LocalCluster, task: str) -> int:
    return int(job_facts(cluster, task)["Restarts"])


def test_killed_and_requeued_tasks_end_in_the_bytes_of_one_process(cluster, tmp_path):
    """A shell would execute the names of the files and folders."""
    files = [tmp_path / "-a.jsonl", tmp_path / "b $(touch CANARY).jsonl"]
    write_corpus(tmp_path, 6000).rename(files[0])
    files[1].write_text(json.dumps({"text": files[1].name}) + "\n")
    home = copy_of_the_commands(tmp_path / f"a {HOSTILE}", site="")
    name = "all $(touch CANARY)"
    shards = tmp_path / f"out/{name}-shards"
    job, merging = submit_all(
        cluster, home, "preprocess", "--output-prefix", tmp_path / "out" / name, "--tokenizer=byte", "--tasks=3",
        "--time=30", "--input", *files, "--", "--append-eod", "--unit-mb=0.01",
    )  # fmt: skip
    wait_for(lambda: shards_done(shards) > 20, "shards", timeout_s=START_S)
    cluster.call("scontrol", "requeue", f"{job}_0")
    cluster.call("scancel", "--batch", "--signal=USR2", f"{job}_1")
    for process in commands(cluster.nodes[0]) + commands(cluster.nodes[1]):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)

    facts = wait_for_end(cluster, merging, timeout_s=2 * START_S)

    logs = "\n".join(path.read_text()[-2000:] for path in (tmp_path / "out/slurm" / shards.name).glob("*.out"))
    assert facts["JobState"] == "COMPLETED", logs
    assert sum(restarts(cluster, f"{job}_{task}") for task in range(3)) >= 2, logs
    assert "goes back into the queue" in logs
    assert contents(tmp_path / "out" / name) == write_serial(files, tmp_path / "serial")
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    manifest = json.loads((tmp_path / f"out/{name}.json").read_text())
    assert manifest["tokens"] == sum(len(text.encode()) + 1 for text in texts)
    assert not canaries(cluster, tmp_path)


def test_a_bad_line_ends_the_array_and_nothing_is_merged(cluster, tmp_path):
    file = write_corpus(tmp_path, 50)
    with file.open("a") as corpus:
        corpus.write("\nbad\n")
    home = copy_of_the_commands(tmp_path / "home", site="")
    jobs = submit_all(
        cluster, home, "preprocess", "--input", file, "--output-prefix", tmp_path / "out/all", "--tokenizer=byte",
        "--tasks=2", "--time=30", "--", "--unit-mb=0.01",
    )  # fmt: skip
    wait_until_gone(cluster, *jobs, timeout_s=START_S)
    logs = "\n".join(path.read_text() for path in (tmp_path / "out/slurm/all-shards").glob(f"{jobs[0]}_*.out"))
    assert f"error: {file}:51: not a JSON object" in logs
    assert "Traceback" not in logs
    assert not list((tmp_path / "out").glob("all.*"))
