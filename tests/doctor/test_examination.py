"""All checks together: none hides another's findings, and what is found is said in every form."""

from __future__ import annotations

import io
import json
import os
import time

import pytest
from rich.console import Console

from megadiff.doctor import examination
from megadiff.doctor.examination import Subject, all_checks, examine, fail, ok, warn
from megadiff.errors import DataError
from tests.support.commands import write_yaml
from tests.support.forked_command import call_forked
from tests.support.runs import toy_tree


def half(subject):
    yield ok("first")
    raise DataError("damaged")


def slow(subject):
    yield ok("quick")
    time.sleep(60)


def raised(error):
    def check(subject):
        raise error

    return check


SICK = {
    "a_crash": raised(ZeroDivisionError("by\nzero")),
    "b_half": half,
    "c_no_library": raised(ModuleNotFoundError("No module named 'no_such_library'")),
    "d_slow": slow,
    "e_exit": raised(SystemExit(3)),
    "f_fine": lambda subject: [ok("fine")],
}


def test_no_check_hides_another():
    start = time.monotonic()
    found = [(f.check, f.level, f.text) for f in examine(Subject({}), checks=SICK, limit_s=1.0)]
    assert time.monotonic() - start < 10
    assert found == [
        ("a_crash", "FAIL", "the check itself failed (ZeroDivisionError: by; zero)"),
        ("b_half", "OK", "first"),
        ("b_half", "FAIL", "damaged"),
        ("c_no_library", "FAIL", "the check itself failed (ModuleNotFoundError: No module named 'no_such_library')"),
        ("d_slow", "OK", "quick"),
        ("d_slow", "FAIL", "no answer in 1 s"),
        ("e_exit", "FAIL", "the check itself failed (SystemExit: 3)"),
        ("f_fine", "OK", "fine"),
    ]


def test_the_checks_are_those_of_machine_and_run():
    wanted = (
        "backend clock data description disk kernels layout memory open_files ports shared_memory tokenizer versions"
    )
    assert list(all_checks()) == wanted.split()


def test_a_platform_that_is_not_there_is_said_by_the_checks_that_need_it(subject_of):
    found = list(examine(subject_of(platform="cuda")))
    failed = {f.check for f in found if f.level == "FAIL"}
    assert failed == {"backend", "kernels", "layout", "memory", "shared_memory"}
    assert all("torch sees no CUDA device" in f.text for f in found if f.level == "FAIL")
    assert {f.check for f in found if f.level == "OK"} >= {"data", "disk", "ports", "tokenizer", "versions"}


FINDINGS = [ok("[red]1[/red] fine"), warn("slow " * 40, "faster"), fail("broken [", "mend it")]


def shown(**options):
    console = Console(file=io.StringIO(), **options)
    examination.show(FINDINGS, console)
    return console.file.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = shown(width=40).splitlines()
    assert len(lines) == 4
    assert lines[0].split(maxsplit=1) == ["OK", "[red]1[/red] fine"]
    assert lines[1].endswith("slow ; faster")
    assert lines[3] == "1 fine, 1 warning(s), 1 failure(s)"


def test_a_table_on_a_terminal_with_nothing_taken_for_markup():
    text = shown(force_terminal=True, width=100, color_system=None)
    assert "[red]1[/red] fine" in text
    assert "what to do" in text
    assert "broken [" in text


@pytest.mark.end_to_end
def test_the_command_says_all_and_ends_with_0_or_2(toy_corpus, tmp_path):
    file = write_yaml(tmp_path / "run.yaml", toy_tree(toy_corpus, tmp_path / "runs"))
    good = call_forked("tools/doctor.py", "--config", file, "--json", "checkpoint.keep=3")
    found = json.loads(good.out)
    assert (good.code, good.err, found["failed"]) == (0, "", False)
    assert any("3 checkpoint(s) kept" in finding["text"] for finding in found["findings"])
    assert {finding["check"] for finding in found["findings"]} == set(all_checks())
    bad = call_forked("tools/doctor.py", "--config", file, "data.train=[nowhere/text]", "--ranks", "3")
    assert (bad.code, bad.err) == (2, "")
    assert [line.split()[1] for line in bad.out.splitlines() if line.startswith("FAIL")] == ["data", "layout"]
    unread = call_forked("tools/doctor.py", "--config", file, "optimizer.lr=fast", "modle.layers=1")
    assert unread.code == 2
    assert "FAIL description    command line: `optimizer.lr` wants a number, found `fast`" in unread.out
    assert "FAIL description    command line: unknown key `modle`; did you mean `model`?" in unread.out
    assert "OK   versions" in unread.out
    assert not (tmp_path / "runs").exists()


def _leave_the_network():
    """Into a network namespace with nothing in it, the loopback down."""
    import ctypes

    new_user, new_network = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_network) and libc.unshare(new_user | new_network):
        os._exit(77)


@pytest.mark.end_to_end
def test_without_a_network_ranks_cannot_meet():
    env = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29600"}
    found = call_forked("tools/doctor.py", env=env, before=_leave_the_network)
    if found.code == 77:
        pytest.skip("no network namespaces here")
    assert (found.code, found.err) == (2, "")
    failed = {line.split()[1]: line for line in found.out.splitlines() if line.startswith("FAIL")}
    assert set(failed) == {"backend", "ports"}
    assert "MASTER_ADDR 10.0.0.1 (10.0.0.1), port 29600, cannot be reached (Network is unreachable)" in failed["ports"]
    assert "gloo: an all-reduce over 2 rank(s) failed" in failed["backend"]


@pytest.mark.end_to_end
def test_the_command_without_a_run_and_misused():
    alone = call_forked("tools/doctor.py")
    assert "give --config to examine a run too" in alone.out
    assert alone.code == (2 if "FAIL" in alone.out else 0)
    assert call_forked("tools/doctor.py", "--ranks", "0").err == "error: --ranks must be at least 1, got 0\n"
    lone = call_forked("tools/doctor.py", "noise.shift=masked")
    assert (lone.code, lone.err[:51]) == (2, "error: `noise.shift=masked` changes a run descripti")
