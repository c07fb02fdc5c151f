"""Rules of the house that no unit test sees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megadiff.config.load import load_config
from megadiff.run.config import RunConfig
from megadiff.run.sweep_folder import plan_sweep
from megadiff.scaling.laws import read_law_file
from tests.support.examples import kind_of_file

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "megadiff").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 800, 80
SHIPPED, MAX_SHIPPED_LINES = ROOT / "megadiff/sampling/standalone.py", 820
"""Copied whole beside an exported model, which has to sample without megadiff."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute or name, else an empty string."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the constants that are documentation, not code."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def test_imports_point_down():
    found = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def cuda_words(path: Path) -> list[str]:
    """Places where code speaks of CUDA: `torch.cuda`, `.cuda(`, a "cuda" literal."""
    tree = ast.parse(path.read_text())
    documentation = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "cuda":
            found.append(f"{name_of(path)}:{node.lineno}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            word = node.value.strip().lower()
            if word == "cuda" or word.startswith("cuda:"):
                found.append(f"{name_of(path)}:{node.lineno} {node.value!r}")
    return found


WORDS_OF_THE_CONFIGURATION = {
    "megadiff/config/suggestions.py": 1,
    "megadiff/run/config.py": 1,
    "megadiff/run/load_model.py": 1,
    "megadiff/export/opened.py": 1,
    "megadiff/cli/evaluate.py": 1,
    "megadiff/cli/generate.py": 1,
    "megadiff/cli/harness.py": 1,
}
"""The names of the choices themselves: `platform: Literal["auto", "cpu", "cuda"]`."""


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_platform_speaks_of_cuda(path):
    if path.parent.name != "platform":
        found = cuda_words(path)
        assert len(found) <= WORDS_OF_THE_CONFIGURATION.get(name_of(path), 0), found


def test_the_cuda_rule_sees_what_it_is_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "bad.py").write_text('"""On cuda."""\nx.cuda()\ntorch.cuda.is_available()\ny.to("cuda:0")\n')
    found = sorted(place.split()[0] for place in cuda_words(tmp_path / "bad.py"))
    assert found == ["bad.py:2", "bad.py:3", "bad.py:4"]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=name_of)
def test_every_example_can_be_read(path):
    """Run descriptions, the bases of some, descriptions of sweeps, and law files."""
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    readers = {
        "run": lambda path: load_config(path, [], RunConfig),
        "sweep": plan_sweep,
        "laws": read_law_file,
        "base": lambda path: None,
    }
    readers[kind_of_file(path)](path)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (MAX_SHIPPED_LINES if path == SHIPPED else MAX_FILE_LINES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_no_tracked_file_is_a_link():
    """A link that one machine's paths fill leads nowhere in every other clone."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []


def test_reading_a_run_description_imports_neither_torch_nor_megatron():
    code = "import sys, megadiff.run.config; print(*{'torch', 'megatron', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_importing_megadiff_does_nothing_to_torch():
    code = (
        "import torch; zeros, state = torch.zeros, torch.get_rng_state();"
        "import megadiff.run.build, megadiff.run.load_model;"
        "assert torch.zeros is zeros and torch.equal(state, torch.get_rng_state());"
        "assert not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


def test_the_architecture_page_shows_every_package_and_top_level_module():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    packages = [
        path.parent.name for path in SOURCES if path.name == "__init__.py" and path.parent.parent == ROOT / "megadiff"
    ]
    modules = [path.name for path in SOURCES if path.parent == ROOT / "megadiff" and path.name != "__init__.py"]
    missing = [f"{name}/" for name in packages if f"  {name}/ " not in page] + [
        name for name in modules if f"  {name} " not in page
    ]
    assert not missing


def test_tests_mirror_the_package():
    packages = {
        path.parent.name for path in SOURCES if path.name == "__init__.py" and path.parent.parent == ROOT / "megadiff"
    }
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    assert packages <= folders


def nameless(root: Path) -> list[str]:
    """Return the tests below a package's name that neither bear a module's name nor open with their subject."""
    found = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        folder, name = root / "megadiff" / path.parent.relative_to(root / "tests"), path.stem.removeprefix("test_")
        if path.parent == root / "tests" or not folder.is_dir():
            continue
        has_module = any((folder / module).exists() for module in (f"{name}.py", f"_{name}.py", f"{name}/__init__.py"))
        if not has_module and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            found.append(path.relative_to(root).as_posix())
    return found


def test_a_test_has_the_name_of_its_module_or_states_its_subject():
    assert nameless(ROOT) == []


def test_the_rule_of_names_sees_what_it_is_for(tmp_path):
    for name in ("megadiff/loss/__init__.py", "megadiff/loss/here.py", "tests/loss/test_here.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "tests/loss/test_gone.py").write_text("import ast\n")
    (tmp_path / "tests/loss/test_other.py").write_text('"""Another subject."""\n')
    assert nameless(tmp_path) == ["tests/loss/test_gone.py"]
