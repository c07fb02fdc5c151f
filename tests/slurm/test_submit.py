"""`slurm/submit`: what it would run, and what it refuses; no Slurm is needed."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megadiff.errors import ConfigError
from tests.support.commands import REPOSITORY, write_yaml
from tests.support.runs import toy_tree

SUBMIT = REPOSITORY / "slurm/submit"
HOSTILE = 'it\'s a "$(touch CANARY)" `touch CANARY` ${HOME} %j;& -x é'


@pytest.fixture
def config(tmp_path):
    return write_yaml(tmp_path / "run.yaml", toy_tree(tmp_path / "corpus", tmp_path / "runs"))


def call(*arguments: str | Path, cwd: Path = REPOSITORY, path: str | None = None):
    environment = {**os.environ, **({} if path is None else {"PATH": path})}
    return subprocess.run(
        [sys.executable, SUBMIT, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def load(path: Path) -> ModuleType:
    """A module from outside any package."""
    loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_loader(path.stem, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    loader.exec_module(module)
    return module


slurm_job, command_line = load(REPOSITORY / "slurm/slurm_job.py"), load(SUBMIT)


def refused(arguments: list, said: str) -> None:
    """The command line is understood, and the job refused in these words."""
    asked = command_line.read_command_line([str(argument) for argument in arguments])
    with pytest.raises(ConfigError, match=re.escape(said)):
        slurm_job.submit(slurm_job.build_job(asked, home=REPOSITORY), dry_run=True)


def words_of(text: str) -> list[list[str]]:
    """The words of the printed command, then those of each array task."""
    command, *tasks = text.split("\n# task ")
    return [shlex.split(command), *(shlex.split(line.split(": ", 1)[1]) for line in tasks)]


def printed(job: str, *arguments: str | Path, **options) -> list[list[str]]:
    """Return what the command prints in a dry run."""
    done = call(job, "--dry-run", *arguments, **options)
    assert done.returncode == 0, done.stderr
    return words_of(done.stdout)


def planned(job: str, *arguments: str | Path) -> list[list[str]]:
    """Return what the command prints in a dry run, without a process for it."""
    asked = command_line.read_command_line([job, *map(str, arguments)])
    with contextlib.redirect_stdout(io.StringIO()) as text:
        slurm_job.submit(slurm_job.build_job(asked, home=REPOSITORY), dry_run=True)
    return words_of(text.getvalue())


def test_a_training_run(config, tmp_path):
    [words] = printed(
        "pretrain", "--config", config, "--nodes=16", "--gpus-per-node=8", "--time=1-00:00:00", "seed=5", "--lead=600",
        "--partition=gpu", "--account=me", "--dependency=afterok:12", "--sbatch=--qos=high", "noise.shift=masked",
    )  # fmt: skip
    run = tmp_path / "runs/toy"
    assert words == [
        "sbatch", "--parsable", "--job-name=toy", f"--output={run}/slurm/%j.out", "--nodes=16", "--gpus-per-node=8",
        "--time=1-00:00:00", "--partition=gpu", "--account=me", "--dependency=afterok:12", "--signal=USR2@600",
        "--qos=high", f"{REPOSITORY}/slurm/pretrain.sbatch", str(REPOSITORY), str(run), "100", f"--config={config}",
        "seed=5", "noise.shift=masked",
    ]  # fmt: skip
    assert not run.exists(), "a dry run writes nothing"


def test_a_hostile_name_stays_one_word(config, tmp_path):
    folder = tmp_path / "a\nb 100% $(touch CANARY)"
    [words] = printed(
        "pretrain", "--config", config, "--time=9", "--lead=60", f"name={HOSTILE}", f"output_dir={folder}", cwd=tmp_path
    )
    run = folder / HOSTILE
    assert words[2] == f"--job-name={HOSTILE}"
    assert words[3] == f"--output={run}/slurm/".replace("%", "%%") + "%j.out"
    assert words[-5:] == [str(run), "100", f"--config={config}", f"name={HOSTILE}", f"output_dir={folder}"]
    assert list(tmp_path.glob("**/CANARY")) == []


def test_a_job_name_keeps_to_one_line(config):
    [words] = planned("pretrain", "--config", config, "--time=9", "--lead=60", "--job-name", "a\nb\x1b")
    assert words[2] == "--job-name=a_b_"


def test_logs_go_where_they_are_asked_for(config, tmp_path):
    [words] = planned("pretrain", "--config", config, "--time=9", "--lead=60", "--logs", tmp_path / "elsewhere")
    assert words[3] == f"--output={tmp_path}/elsewhere/%j.out"


def test_a_sweep_has_a_task_for_each_row(config, tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("# rates\nname=a optimizer.lr=1e-3\n\nname='b c' optimizer.lr=2e-3  # the larger\n")
    words, *tasks = planned(
        "sweep", "--config", config, "--rows", rows, "--time=1:00:00", "--at-once=4", "--max-restarts=7", "seed=9"
    )
    logs = tmp_path / "runs/sweep-rows/slurm"
    assert "--array=0-1%4" in words
    assert f"--output={logs}/%A_%a.out" in words
    assert words[-3:] == [str(REPOSITORY), str(logs), "7"]
    assert tasks == [
        [f"{tmp_path}/runs/a", f"--config={config}", "seed=9", "name=a", "optimizer.lr=1e-3"],
        [f"{tmp_path}/runs/b c", f"--config={config}", "seed=9", "name=b c", "optimizer.lr=2e-3"],
    ]


def test_preprocessing_has_tasks_for_one_folder_and_then_a_merge(tmp_path):
    files = [tmp_path / name for name in ("-a.jsonl", "b $(x).jsonl")]
    for file in files:
        file.touch()
    common = ["--tokenizer=byte", "--time=10", "--account=me", "--cpus-per-task=4", "--input", *files]
    done = call("preprocess", "--dry-run", "--output-prefix=data/all", "--tasks=2", *common, "--", "--append-eod",
                cwd=tmp_path)  # fmt: skip
    array, *tasks, then = [shlex.split(line) for line in done.stdout.splitlines()]
    shards = tmp_path / "data/all-shards"
    logs = tmp_path / "data/slurm/all-shards"
    assert "--array=0-1" in array
    assert "--cpus-per-task=4" in array
    assert array[-2:] == [str(REPOSITORY), str(logs)]
    arguments = ["--input", *map(str, files), f"--shards={shards}", "--tokenizer=byte", "--workers=4", "--append-eod"]
    assert [task[3:] for task in tasks] == [[str(shards), *arguments]] * 2
    assert then[:2] == ["#", "then:"]
    assert {"--dependency=afterok:JOB", "--kill-on-invalid-dep=yes", "--account=me"} <= set(then)
    assert "--cpus-per-task=4" not in then
    merging = [f"--merge={shards}", f"--output-prefix={tmp_path}/data/all"]
    assert then[-4:] == [f"{REPOSITORY}/slurm/merge.sbatch", str(REPOSITORY), *merging]

    alone = call("preprocess", "--dry-run", "--shards=s", *common, "--", "--workers=2", cwd=tmp_path).stdout
    assert "# then" not in alone
    assert alone.splitlines()[1].endswith(f"--shards={tmp_path}/s --tokenizer=byte --workers=2")


def test_evaluating_and_converting(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    [words] = planned("evaluate", "--model", run, "--data=x", "--time=5", "--gpus-per-node=1")
    assert words[-4:] == [str(REPOSITORY), "elbo", f"--model={run}", "--data=x"]
    assert f"--output={run}/slurm/%j.out" in words
    [words] = planned("convert", "--checkpoint", run, "--output", tmp_path / "out", "--time=5")
    assert words[-4:] == [str(REPOSITORY), "export", f"--checkpoint={run}", f"--output={tmp_path}/out"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--time=soon"], "--time soon: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS is wanted"),
        (["--time=0"], "--time 0: a limit above zero is wanted; 0 would mean none"),
        (["--time=5", "--lead=300"], "--lead 300: the time limit is 300 s, so a lead below that is wanted"),
        (["--time=5", "--lead=0"], "--lead 0: a number of at least 1 is wanted"),
        (["--time=3-0", "--lead=70000"], "--lead 70000: Slurm takes at most 65535 seconds"),
        (["--time=1:0:0", "--nodes=0"], "--nodes 0: a number of at least 1 is wanted"),
        (["--time=1:0:0", "--gpus-per-node=-1"], "--gpus-per-node -1: a number of at least 0 is wanted"),
        (["--time=1:0:0", "--max-restarts=-1"], "--max-restarts -1: a number of at least 0 is wanted"),
        (["--time=1:0:0", "--dependency=afterok;1"], "--dependency afterok;1: a list such as"),
        (
            ["--time=1", "--lead=9"],
            "stop.grace_period_s is 120, and the time limit 60 s: the run would stop before its first step",
        ),
        (["--time=1:0:0", "optimizer.lrr=1"], "unknown key `optimizer.lrr`; did you mean `optimizer.lr`?"),
        (["--time=1:0:0", "output_dir=a\\b"], "Slurm cannot write to a file with a backslash in its name"),
    ],
)
def test_a_mistake_is_one_sentence(config, arguments, said):
    refused(["pretrain", "--config", config, *arguments], said)


def test_files_that_are_not_there_are_named(config, tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("# nothing\n")
    for arguments, said in (
        (["pretrain", "--config", tmp_path / "no.yaml"], "no.yaml: the run description does not exist"),
        (["sweep", "--config", config, "--rows", tmp_path / "no.txt"], "no.txt: No such file"),
        (["sweep", "--config", config, "--rows", rows], "no row of overrides"),
        (
            ["preprocess", "--input", "no", "--output-prefix=x", "--tokenizer=byte"],
            "--input no: there is no such file or folder",
        ),
        (["preprocess", "--input", "no", "--tokenizer=byte"], "--output-prefix P is wanted for one file, or --shards"),
        (["evaluate", "--model", "no", "--data=x"], "--model no: there is no such folder"),
        (["convert", "--checkpoint", "no", "--output=x"], "--checkpoint no: there is no such folder"),
    ):
        refused([*arguments, "--time=1:00:00"], said)


def test_a_command_refuses_with_code_2_and_without_a_traceback(config):
    done = call("pretrain", "--config", config, "--time=soon")
    assert done.returncode == 2
    assert done.stderr == "error: --time soon: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS is wanted\n"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-2:30", 95400), ("1-2:30:05", 95405)],
)
def test_times_are_read_as_slurm_does(text, seconds):
    assert slurm_job.seconds_of(text) == seconds


def test_two_rows_of_one_run_are_refused(config, tmp_path):
    rows = tmp_path / "rows.txt"
    rows.write_text("seed=1\nseed=2\n")
    said = f"rows.txt:2: the run folder {tmp_path}/runs/toy is that of line 1 too"
    refused(["sweep", "--config", config, "--rows", rows, "--time=1:00:00"], said)


def test_account_and_partition_are_read_from_the_site_file_not_run(tmp_path):
    site = tmp_path / "site.env"
    site.write_text("touch CANARY\nMEGADIFF_ACCOUNT='my project' # ours\n export X=1\nexport MEGADIFF_PARTITION=gpu\n")
    assert slurm_job.site_defaults(site) == {"MEGADIFF_ACCOUNT": "my project", "MEGADIFF_PARTITION": "gpu"}
    assert slurm_job.site_defaults(tmp_path / "none") == {}


def test_no_scheduler_is_one_sentence(config, tmp_path):
    done = call("pretrain", "--config", config, "--time=1:00:00", path=str(tmp_path))
    assert (done.returncode, done.stderr) == (
        2,
        "error: there is no sbatch here; run slurm/submit on a login node, or look with --dry-run\n",
    )
