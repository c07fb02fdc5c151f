"""The program `megadiff`: its list of commands, the three ways to call each, and the installed package."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import megadiff.cli
from megadiff.__main__ import commands, main, summary

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = commands()
SOURCES = sorted((ROOT / "megadiff").rglob("*.py"))
NAME_SCRIPTS = {ROOT / "megadiff/cli/__init__.py", ROOT / "megadiff/cli/branch_cooldowns.py"}
"""Files that know of the scripts: one describes them, the other starts the one of a checkout."""
THREE_WAYS = """
import contextlib, io, json, os, runpy, sys
from megadiff.__main__ import commands, main

del sys.modules["megadiff.__main__"]  # runpy warns of it

def said(run):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        run()
    return text.getvalue()

found, heavy = {}, set()
for command in [None, *commands()]:
    words = [command, "--help"] if command else ["--help"]
    script = "pretrain_dlm.py" if command == "train" else f"tools/{command}.py"
    ways = {"megadiff": main, "module": lambda: runpy.run_module("megadiff", run_name="__main__")}
    found[command or ""] = shown = {}
    for way, run in ways.items():
        sys.argv = [os.path.abspath("bin/megadiff"), *words]
        shown[way] = said(run)
    if command:
        sys.argv = [os.path.abspath(script), "--help"]
        shown["script"] = said(lambda: runpy.run_path(script, run_name="__main__"))
    now = {"torch", "megatron"} & set(sys.modules)
    shown["loaded"] = sorted(now - heavy)
    heavy |= now
print(json.dumps(found))
"""


def megadiff_program(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megadiff", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)


def words_for_users(path: Path) -> str:
    """Return the texts of a file's code, docstrings included; names and comments are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return "\n".join(
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@pytest.fixture(scope="module")
def helps() -> dict[str, dict[str, str]]:
    """Return the text of `--help` in each of the three ways, by command; "" is `megadiff --help`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", THREE_WAYS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_commands_are_those_that_are_documented():
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"| `{name}` |" not in page] == []
    assert {"train", "generate", "doctor", "train_tokenizer"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_the_same_in_three_ways_and_loads_nothing_heavy(helps, command):
    shown = helps[command]
    script = "pretrain_dlm.py" if command == "train" else f"{command}.py"
    texts = set()
    for way, program in (("megadiff", f"megadiff {command}"), ("module", f"megadiff {command}"), ("script", script)):
        usage = f"usage: {program} "
        assert shown[way].startswith(usage)
        texts.add(" ".join(shown[way].removeprefix(usage).split()))  # usage lines are indented by the program's name
    assert len(texts) == 1
    assert shown["loaded"] == []


def test_the_list_of_commands_has_a_line_each_and_loads_nothing_heavy(helps):
    shown = helps[""]
    assert shown["megadiff"] == shown["module"]
    assert shown["loaded"] == []
    lines = shown["megadiff"].splitlines()
    for command in COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {command} ")]
        assert line.endswith(summary(command))
        assert len(line) <= 120


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_messages_write_commands_as_the_installed_package_has_them(path):
    words = words_for_users(path)
    assert path in NAME_SCRIPTS or not re.findall(r"tools/\w+\.py|pretrain_dlm\.py", words)
    named = re.findall(r"(?:^ +|`|run |-m )megadiff ([a-z_]+)", words, re.MULTILINE)
    assert [name for name in named if name not in COMMANDS] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_summary_is_one_sentence(command):
    assert summary(command).endswith(".")
    assert summary(command).count(". ") == 0


def test_the_list_needs_no_library():
    """Names and lines come from the files: nothing but the standard library is imported."""
    code = (
        "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path];"
        "sys.argv = ['megadiff', '--help'];"
        "from megadiff.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  generate " in done.stdout


def test_a_module_is_a_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "say_words.py").write_text(
        '"""Say words.\n\nMore."""\nimport sys\n\n\ndef main():\n    print(sys.argv)\n', encoding="utf-8"
    )
    (tmp_path / "_own.py").write_text('"""No command."""\n', encoding="utf-8")
    monkeypatch.setattr(megadiff.cli, "__path__", [*megadiff.cli.__path__, str(tmp_path)])
    assert set(commands()) - set(COMMANDS) == {"say_words"}
    assert summary("say_words") == "Say words."
    for typed in ("say_words", "say-words"):
        monkeypatch.setattr(sys, "argv", ["megadiff", typed, "-x", "a b"])
        main()
        assert capsys.readouterr().out == "['megadiff say_words', '-x', 'a b']\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["genrate"], "megadiff: unknown command `genrate`; did you mean `generate`?"),
        (["inspect-checkpiont"], "megadiff: unknown command `inspect-checkpiont`; did you mean `inspect_checkpoint`?"),
        (["xyzzy"], "megadiff: unknown command `xyzzy`; `megadiff --help` lists the commands"),
        (["--verison"], "megadiff: unknown option `--verison`; did you mean `--version`?"),
        (["generate", "--modell", "x"], "command line: the following arguments are required: --model"),
        (["doctor", "-q"], "command line: `-q` is no option of this command"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(sys, "argv", ["megadiff", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


def test_a_mistake_names_the_program_that_was_called(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/megadiff", "generate"])
    with pytest.raises(SystemExit):
        main()
    assert "`megadiff generate --help` lists the options" in capsys.readouterr().err


def test_the_program_runs_as_a_module():
    done = megadiff_program("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"megadiff {megadiff.__version__}\n", "")
    done = megadiff_program("train", "--config", "examples/demo.yaml", "optimizer.lrr=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown key `optimizer.lrr`; did you mean `optimizer.lr`?" in done.stderr


def can_build() -> bool:
    """Whether pip is here, and a setuptools that builds wheels by itself or with the package `wheel`."""
    found = {}
    for name in ("pip", "setuptools", "wheel"):
        with contextlib.suppress(PackageNotFoundError):  # looking for the module pip would change setuptools
            found[name] = int(version(name).partition(".")[0])
    return "pip" in found and ("wheel" in found or found.get("setuptools", 0) > 70)


@pytest.mark.skipif(not can_build(), reason="pip and setuptools cannot build a wheel here")
def test_the_installed_package_has_the_program_and_every_command(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    copytree(ROOT / "megadiff", source / "megadiff", ignore=ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "requirements/docs.txt"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path, source], check=True, timeout=1000)
    (wheel,) = tmp_path.glob("megadiff-*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {f"megadiff/cli/{command}.py" for command in COMMANDS} <= set(files)
    assert not [name for name in files if not name.startswith("megadiff")]
    laws = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megadiff/scaling/published").iterdir()}
    assert laws
    assert laws <= set(files)
    subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True, timeout=1000)

    def installed(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, site / "bin/megadiff", *words]
        env = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)

    listed = installed("--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [name for name in COMMANDS if f"  {name} " not in listed.stdout] == []
    assert installed("train-tokenizer", "--help").stdout.startswith("usage: megadiff train_tokenizer ")
    refused = installed("coordinate_check")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --config is missing")
    assert str(site) in refused.stderr, "the package that was installed is the one that answered"
