"""Nothing here needs a network, or looks for one: not an import, not a run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec

import pytest

from tests.security.children import in_child
from tests.security.offline import watch_connections
from tests.support.commands import REPOSITORY, write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree

IN_EMPTY_NAMESPACE = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
NOWHERE = ("192.0.2.1", 9)


def why_no_namespace() -> str:
    """Why a network namespace cannot be made here; empty where it can."""
    missing = [name for name in ("unshare", "ip") if shutil.which(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}"
    made = subprocess.run([*IN_EMPTY_NAMESPACE, "true"], capture_output=True, text=True, check=False)
    return "" if made.returncode == 0 else f"needs the right to make a network namespace: {made.stderr.strip()}"


@pytest.fixture
def description(toy_corpus, tmp_path):
    tree = toy_tree(
        toy_corpus, tmp_path, model__layers=1, schedule__steps=2, schedule__warmup_steps=1, log__tensorboard=True
    )
    return write_yaml(tmp_path / "run.yaml", tree)


def test_a_run_and_every_import_succeed_where_there_is_no_network(description, tmp_path):
    """Loopback alone is up: ranks of one machine speak over it."""
    if reason := why_no_namespace():
        pytest.skip(reason)
    probe = f"import socket; socket.create_connection({NOWHERE!r}, timeout=5)"
    lonely = subprocess.run(
        [*IN_EMPTY_NAMESPACE, sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert "Network is unreachable" in lonely.stderr, "the control"
    ended = subprocess.run(
        [*IN_EMPTY_NAMESPACE, sys.executable, "-m", "tests.security.offline", "--config", str(description)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = dict(line.split(" ", 1) for line in ended.stdout.splitlines()[-2:])
    assert json.loads(said["connections"]) == []
    unimported = json.loads(said["unimported"])
    assert all(find_spec(package) is None for package in unimported.values()), unimported
    assert (tmp_path / "toy/checkpoints/step_00000002/manifest.json").is_file()


def test_a_run_tries_to_reach_nothing_beyond_this_machine(description, tmp_path):
    """The same where there is a network: an attempt that fails silently would be one all the same."""
    record = tmp_path / "connections"
    record.touch()

    def watch():
        watch_connections(lambda attempt: record.open("a").write(attempt + "\n"))

    ended = call_forked("pretrain_dlm.py", "--config", description, before=watch)
    assert ended.code == 0, ended.err
    assert record.read_text() == ""


def _connect_somewhere():
    seen = []
    watch_connections(seen.append)
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        one.settimeout(0.01)
        one.connect(NOWHERE)
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as one:
        one.settimeout(0.01)
        one.connect(("127.0.0.1", 9))
    return seen


def test_the_watch_sees_an_attempt_and_lets_loopback_pass():
    assert in_child(_connect_somewhere) == [f"socket.connect {NOWHERE!r}"]
