"""Findings about the machine, each brought about for real."""

from __future__ import annotations

import resource
import shutil
import socket
import subprocess
import sys
import time

import pytest

from megadiff.doctor import machine
from megadiff.doctor.examination import Subject
from tests.support.commands import REPOSITORY

MACHINE = Subject({})


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of installed packages that comes before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(packages, project, version):
    (packages / f"{project}-{version}.dist-info").mkdir()
    (packages / f"{project}-{version}.dist-info" / "METADATA").write_text(f"Name: {project}\nVersion: {version}\n")


def test_this_environment_is_in_range(findings_of):
    assert {level for level, *_ in findings_of("versions", MACHINE)} == {"OK"}


@pytest.mark.parametrize(
    ("project", "version", "level", "words"),
    [
        ("torch", "2.6.0", "FAIL", "CVE-2026-24747"),
        ("torch", "2.9.1+cu128", "FAIL", "CVE-2026-24747"),
        ("torch", "2.10.0a0+nv26.1", "OK", "torch 2.10.0a0"),
        ("megatron_core", "0.15.2", "FAIL", "CVE-2026-24150"),
        ("megatron_core", "0.20.0", "WARN", "newer than any"),
        ("numpy", "1.24.0", "FAIL", "numpy 1.24.0"),
        ("transformer_engine", "2.8.0", "FAIL", "megatron-core 0.16"),
        ("transformer_engine", "2.10.0", "OK", "transformer-engine 2.10.0"),
    ],
)
def test_a_version_that_is_installed_is_judged(findings_of, packages, project, version, level, words):
    install(packages, project, version)
    found = [f for f in findings_of("versions", MACHINE) if version in f[1]]
    assert len(found) == 1, found
    assert found[0][0] == level
    assert words in found[0][1]
    assert level == "OK" or f"pip install '{project.replace('_', '-')}>=" in found[0][2]


def test_a_missing_library_is_named_with_its_requirement(findings_of, monkeypatch):
    nowhere = machine.Range("no-such-project", (1, 2), (2,), "untried")
    monkeypatch.setattr(machine, "_RANGES", (nowhere,))
    assert findings_of("versions", MACHINE)[1] == (
        "FAIL",
        "no-such-project is not installed",
        "pip install 'no-such-project>=1.2,<2'",
    )


def test_the_other_project_named_apex_is_recognised_and_never_imported(findings_of, packages):
    apex = packages / "apex"
    apex.mkdir()
    (apex / "__init__.py").write_text("raise SystemExit('imported')")
    (level, text, remedy), (still, *_) = findings_of("kernels", MACHINE)
    assert (level, still) == ("WARN", "OK")
    assert "not NVIDIA's Apex" in text
    assert "pip uninstall apex" in remedy
    (apex / "optimizers").mkdir()
    ((level, text, _),) = findings_of("kernels", MACHINE)
    assert (level, "Apex" in text.partition("installed: ")[2].split(", ")) == ("OK", True)


def test_two_forked_ranks_sum(one_finding):
    level, text, _ = one_finding("backend", MACHINE)
    assert (level, text[:38]) == ("OK", "gloo: an all-reduce over 2 rank(s) of ")


def test_an_interface_that_is_not_there_fails_the_all_reduce(one_finding, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    level, text, remedy = one_finding("backend", MACHINE)
    assert level == "FAIL", text
    assert "nowhere0" in text
    assert "GLOO_SOCKET_IFNAME" in remedy


@pytest.fixture
def taken_port():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        yield str(holder.getsockname()[1])


def last_about_ports(findings_of, **environment):
    return findings_of("ports", Subject(environment))[-1]


def test_a_port_in_use_is_named(findings_of, taken_port):
    level, text, remedy = last_about_ports(findings_of, MASTER_PORT=taken_port)
    assert (level, taken_port in text, "MASTER_PORT" in remedy) == ("FAIL", True, True)
    level, text, _ = last_about_ports(findings_of, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken_port)
    assert (level, text) == ("FAIL", f"MASTER_ADDR 127.0.0.1 is this node, and its port {taken_port} is in use")


def test_an_address_nobody_knows_and_ports_that_are_none(findings_of):
    level, text, _ = last_about_ports(findings_of, MASTER_ADDR="nowhere.invalid", MASTER_PORT="29600")
    assert (level, "nowhere.invalid does not resolve" in text) == ("FAIL", True)
    for port in ("http", "0", "65536", ""):
        level, text, _ = last_about_ports(findings_of, MASTER_PORT=port)
        assert (level, text) == ("FAIL", f"MASTER_PORT is {port!r}, wanted a number from 1 to 65535")


def test_this_node_is_known_by_its_own_address():
    from megadiff.doctor.machine import _is_this_node

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        own = probe.getsockname()[0]
    assert _is_this_node(own)
    assert _is_this_node("127.0.1.1")
    assert not _is_this_node("192.0.2.1")


def test_a_free_meeting_place_is_fine(findings_of):
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    level, text, _ = last_about_ports(findings_of, MASTER_ADDR="localhost", MASTER_PORT=port)
    assert (level, text) == ("OK", f"MASTER_ADDR localhost is this node, and its port {port} is free")


def test_a_folder_that_cannot_be_written_and_one_that_is_a_file(one_finding, subject_of, tmp_path):
    level, text, remedy = one_finding("disk", subject_of(output_dir="/proc/nowhere"))
    assert (level, text.startswith("/proc cannot be written ("), "output_dir" in remedy) == ("FAIL", True, True)
    (tmp_path / "file").touch()
    level, text, _ = one_finding("disk", subject_of(output_dir=str(tmp_path / "file")))
    assert (level, "(Not a directory)" in text) == ("FAIL", True)


def test_the_disk_is_written_to_and_left_as_it_was(findings_of, subject_of, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    (level, text, _), (room, said, _) = findings_of("disk", subject_of())
    assert (level, room) == ("OK", "OK")
    assert "write, fsync and rename work" in text
    assert "2 checkpoint(s) kept and one being written" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_that_the_disk_cannot_hold(findings_of, subject_of):
    big = {"model__layers": 2000, "model__hidden": 65536}
    level, text, remedy = findings_of("disk", subject_of(**big))[1]
    assert level == "FAIL", text
    assert "checkpoint.keep" in remedy
    every = {"checkpoint": {"keep": 0, "every": 3}}
    assert "4 checkpoint(s) kept" in findings_of("disk", subject_of(**every))[1][1]


def test_a_slow_disk_is_a_warning(findings_of, subject_of, monkeypatch):
    monkeypatch.setattr(machine, "_SLOW_BYTES_PER_S", 1e15)
    assert findings_of("disk", subject_of())[0][0] == "WARN"


def test_what_one_node_cannot_tell_of_several_is_said(findings_of, subject_of):
    level, text, remedy = findings_of("disk", subject_of(environment={"SLURM_JOB_NUM_NODES": "4"}))[-1]
    assert level == "WARN"
    assert "4 nodes must see one" in text
    assert "cannot be checked from a single node" in text
    assert "srun -N 4" in remedy


def test_the_file_system_is_the_innermost_mount():
    assert machine.file_system_of(machine.Path("/proc/self")) == "proc"


@pytest.mark.parametrize(("shift", "words"), [(100.0, "behind"), (-3600.0, "ahead of")])
def test_a_clock_that_differs_from_the_disks(one_finding, shift, words):
    level, text, remedy = one_finding("clock", Subject({}, now=lambda: time.time() + shift))
    assert (level, words in text, "NTP" in remedy) == ("WARN", True, True)
    assert one_finding("clock", MACHINE)[0] == "OK"


def test_few_open_files_are_a_warning_and_too_few_a_failure(one_finding):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, before[1]))
        assert one_finding("open_files", MACHINE)[0] == "WARN"
        level, text, remedy = one_finding("open_files", Subject({}, wanted_ranks=512))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (level, text) == ("FAIL", "a process may open 600 files; 512 rank(s) may need about 4224 each")
    assert remedy.startswith("ulimit -n 8448 ")
    assert one_finding("open_files", MACHINE)[0] == ("OK" if before[0] == -1 or before[0] >= 1024 else "WARN")


def test_shared_memory_that_is_missing(one_finding, tmp_path):
    level, text, remedy = one_finding("shared_memory", Subject({}, shared_memory=tmp_path / "shm"))
    assert (level, "cannot be used" in text, "--shm-size" in remedy) == ("WARN", True, True)
    assert one_finding("shared_memory", Subject({}, shared_memory=tmp_path))[0] == "OK"


def test_shared_memory_that_is_small(tmp_path):
    """A real file system of one MiB, in a mount namespace of its own."""
    code = (
        "from pathlib import Path; from megadiff.doctor.examination import Subject;"
        "from megadiff.doctor.machine import check_shared_memory;"
        f"print(*check_shared_memory(Subject({{}}, shared_memory=Path({str(tmp_path)!r}))))"
    )
    script = 'mount -t tmpfs -o size=1m small "$1" && exec "$2" -c "$3"'
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, code]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "level='WARN'" in found.stdout, found.stderr
    assert "has 1 MiB, wanted 16" in found.stdout
