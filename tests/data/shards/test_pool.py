"""Shards survive kills at any moment, full disks and bad input, and are the same bytes for any number of processes.

`MEGADIFF_SHARD_KILLS=30 python -m pytest tests/data/shards/test_pool.py -k random` kills the real command thirty times.
"""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from megadiff.data.documents import Corpus
from megadiff.data.shards import work as module
from megadiff.data.shards.finish import finish, merge, report_of
from megadiff.data.shards.ledger import Ledger
from megadiff.data.shards.work import make_shards
from megadiff.data.tokenizers import load_tokenizer
from megadiff.errors import DataError
from tests.data.shards.corpus import FRAMING, UNIT_BYTES, contents, end_by_kill, write_files, write_serial
from tests.support.disk import watched_disk
from tests.support.forked_command import call_forked

KILLS = int(os.environ.get("MEGADIFF_SHARD_KILLS", "3"))
FORK = multiprocessing.get_context("fork")


def make(files, folder, **options):
    make_shards(Corpus(files), folder, "byte", framing=FRAMING, unit_bytes=UNIT_BYTES, **options)


def merged(folder, prefix):
    """Return the content of the merged files, once nothing but finished shards is in the folder."""
    merge(folder, prefix, overwrite=True)
    assert sorted(os.listdir(folder)) == ["plan.json", "shards", "tokens.idx", "tokens.json"]
    assert all(name.isdecimal() for name in os.listdir(folder / "shards"))
    return contents(prefix)


def test_two_workers_write_the_serial_bytes(tmp_path):
    files = write_files(tmp_path)
    serial = write_serial(files, tmp_path / "serial")
    make(files, tmp_path / "shards", workers=2)
    records = [Ledger(tmp_path / "shards").record(unit) for unit in Ledger(tmp_path / "shards").done()]
    assert len(records) >= 8
    assert os.getpid() not in {record.process for record in records}
    assert merged(tmp_path / "shards", tmp_path / "merged") == serial


def test_several_commands_at_once_make_each_shard_once(tmp_path):
    """Four processes that were started together, as on four nodes."""
    files, folder = write_files(tmp_path), tmp_path / "shards"
    serial = write_serial(files, tmp_path / "serial")
    processes = [FORK.Process(target=make, args=(files, folder)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len({Ledger(folder).record(unit).process for unit in Ledger(folder).done()}) > 1
    assert merged(folder, tmp_path / "merged") == serial


def killed_before(change, files, folder):
    """Make shards in a process that is killed before its nth change to the disk; return whether it got that far."""

    def run():
        count = [0]

        def announce(what):
            count[0] += str(folder) in what
            if count[0] > change:
                os.kill(os.getpid(), signal.SIGKILL)

        with watched_disk(announce):
            make(files, folder)
            finish(folder)

    process = FORK.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_kill_before_any_change_to_the_disk_loses_nothing(tmp_path):
    """Killed again and again, each time a few changes later, always in the same folder."""
    files, folder = write_files(tmp_path), tmp_path / "shards"
    serial = write_serial(files, tmp_path / "serial")
    draw, kills = random.Random(1), 0
    while killed_before(draw.randint(0, 80), files, folder):
        kills += 1
    assert kills > 3
    assert merged(folder, tmp_path / "merged") == serial


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_one_sentence_and_keeps_what_is_done(tmp_path, number):
    files, folder = write_files(tmp_path), tmp_path / "shards"
    serial = write_serial(files, tmp_path / "serial")
    draw, refusals = random.Random(2), 0
    while True:
        left, done = draw.randint(0, 90), len(Ledger(folder).done()) if (folder / "shards").exists() else 0

        def refuse(what, count=[left]):  # noqa: B006 - counts from one call to the next
            count[0] -= str(folder) in what and not what.startswith(("unlink", "rmdir", "remove"))
            if count[0] < 0:
                raise OSError(number, os.strerror(number))

        said = None
        with watched_disk(refuse):
            try:
                make(files, folder)
                finish(folder)
            except DataError as error:
                said = str(error)
        if said is None:
            break
        refusals += 1
        assert os.strerror(number) in said
        assert "\n" not in said
        assert done <= (len(Ledger(folder).done()) if (folder / "shards").exists() else 0)
    assert refusals > 3
    assert merged(folder, tmp_path / "merged") == serial


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    files = write_files(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/shards.*: writing failed \(Not a directory\); free disk space or check"):
        make(files, tmp_path / "file/shards")
    ended = call_forked(
        "tools/preprocess_data.py", "--input", files[1], "--tokenizer", "byte", "--shards", "/proc/shards"
    )
    assert ended.code == 2
    assert ended.err.startswith("error: /proc/shards")
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_is_named_by_its_line_in_the_file(tmp_path, workers):
    files, folder = write_files(tmp_path), tmp_path / "shards"
    lines = files[0].read_bytes().split(b"\n")
    bad = (40, 120)
    for place in bad:
        lines[place] = b"bad"
    files[0].write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:(41|121): not a JSON object .*0 bad lines are allowed"):
        make(files, folder, workers=workers)
    with pytest.raises(DataError, match=rf"a\.jsonl:{bad[1] + 1}: .*\(1 bad lines are allowed and this is one more"):
        make_shards(Corpus(files, max_bad_lines=1), folder, "byte", framing=FRAMING, unit_bytes=UNIT_BYTES)
    corpus = Corpus(files, max_bad_lines=2)
    make_shards(corpus, folder, "byte", framing=FRAMING, unit_bytes=UNIT_BYTES, workers=workers)
    serial = write_serial(files, tmp_path / "serial", max_bad_lines=2)
    assert merged(folder, tmp_path / "merged") == serial
    list(corpus.documents())
    assert report_of(folder) == corpus.report
    with pytest.raises(DataError, match=r"wanted at most 1 bad lines, found 2 in all shards; raise --max-bad-lines"):
        make_shards(Corpus(files, max_bad_lines=1), folder, "byte", framing=FRAMING, unit_bytes=UNIT_BYTES)


def test_a_file_that_changes_while_units_are_left_is_refused(tmp_path):
    files, folder = write_files(tmp_path), tmp_path / "shards"
    plan = Ledger(folder).begin(module.make_plan(Corpus(files), load_tokenizer("byte"), FRAMING, unit_bytes=UNIT_BYTES))
    with files[1].open("a") as file:
        file.write('{"text": "more"}\n')
    worker = module.Worker(Ledger(folder), plan, load_tokenizer("byte"), max_bad_lines=0, show=lambda tokens: None)
    with pytest.raises(DataError, match=r"b\.jsonl: changed since .*shards was begun: wanted .*, found"):
        worker.run()


def test_a_unit_that_kills_every_worker_ends_the_pool(tmp_path, monkeypatch):
    files = write_files(tmp_path)
    monkeypatch.setattr(module, "_work", end_by_kill)
    with pytest.raises(DataError, match=r"3 worker processes died one after the other \(the last with exit code -9\)"):
        make(files, tmp_path / "shards", workers=2)


def children_of(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in listed.stdout.split()]


def test_random_kills_of_the_command_and_its_workers(tmp_path):
    """A killed worker is replaced; a killed command is repeated, and continues."""
    file, folder = tmp_path / "a.jsonl", tmp_path / "shards"
    draw = random.Random(KILLS)
    text = "".join(json.dumps({"text": "née fox " * draw.randint(0, 400)}) + "\n" for _ in range(1500))
    file.write_text(text)
    serial = write_serial([file], tmp_path / "serial")
    command = [sys.executable, "-m", "megadiff", "preprocess_data", "--input", str(file), "--tokenizer", "byte"]
    command += ["--append-eod", "--shards", str(folder), "--workers", "2", "--unit-mb", "0.02"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    kills, is_done = 0, False
    while not is_done:
        running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        timer = threading.Timer(200, running.kill)
        timer.start()
        while kills < KILLS and running.poll() is None:
            workers = children_of(running.pid)
            is_command = draw.random() < 0.4
            time.sleep(draw.uniform(0.2, 1.5))
            if is_command or workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(running.pid if is_command else draw.choice(workers), signal.SIGKILL)
                    kills += 1
            if is_command:
                break
        _, errors = running.communicate()
        timer.cancel()
        assert running.returncode in (0, -signal.SIGKILL), errors
        is_done = running.returncode == 0
    assert merged(folder, tmp_path / "merged") == serial


def test_the_command_writes_shards_and_merges_them(tmp_path):
    files = write_files(tmp_path)
    serial = write_serial(files, tmp_path / "serial")
    words = ["--input", *files, "--tokenizer", "byte", "--append-eod", "--shards", tmp_path / "s"]
    made = call_forked("tools/preprocess_data.py", *words, "--unit-mb", "0.004")
    assert (made.code, made.err) == (0, "")
    assert f"{files[0]}: 150 document(s) read" in made.out or f"{files[0]}: 14" in made.out
    assert f"wrote {tmp_path}/s: " in made.out
    again = call_forked("tools/preprocess_data.py", *words, "--unit-mb", "0.004")
    assert (again.code, again.err) == (0, "")
    done = call_forked("tools/preprocess_data.py", "--merge", tmp_path / "s", "--output-prefix", tmp_path / "m")
    assert (done.code, done.err) == (0, "")
    assert contents(tmp_path / "m") == serial


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--input a --tokenizer byte", "required: --output-prefix; give --output-prefix P, or --shards DIR"),
        ("--input a --output-prefix p", "required: --tokenizer"),
        ("--shards s", "required: --input, --tokenizer"),
        ("--merge s", "required: --output-prefix"),
        ("--merge s --output-prefix p --tokenizer byte", "--tokenizer has no meaning with --merge; drop --tokenizer"),
        ("--input a --tokenizer byte --shards s --output-prefix p", "--output-prefix has no meaning with --shards; "),
        ("--input a --tokenizer byte --output-prefix p --unit-mb 3", "--unit-mb has no meaning without --shards; drop"),
        ("--merge no --output-prefix p", "no: wanted a folder of shards, found no plan.json in it; make one with"),
    ],
)
def test_options_that_do_not_belong_together(words, said):
    ended = call_forked("tools/preprocess_data.py", *words.split())
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1
