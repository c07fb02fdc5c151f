"""The lint of the project's prose finds what it is for, and nothing in good prose."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("prose", ROOT / ".ci/prose.py")
assert SPEC is not None
assert SPEC.loader is not None
prose = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(prose)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('def f():\n    """Of the same bytes."""\n', "f: the docstring starts with 'Of'"),
        ('def f():\n    """The norm of a gradient."""\n', "f: the docstring starts with 'The'"),
        ('class A:\n    """What a rank holds."""\n', "a docstring starts with 'What'"),
        ('"""Where files are."""\n', "a docstring starts with 'Where'"),
        ('a: int = 0\n"""Whether it is there."""\n', "for booleans alone"),
        ("# mend the file\n", "'mend': write fix"),
        ('def f():\n    """Return a key drawn anew."""\n', "'anew': write again"),
        ('def f():\n    """Return a key.\n\n    It is drawn anew.\n    """\n', "'anew': write again"),
    ],
)
def test_a_fault_is_found(tmp_path, text, fault):
    path = tmp_path / "module.py"
    path.write_text(text)
    ((_, message),) = prose.findings(path)
    assert fault in message


@pytest.mark.parametrize(
    "text",
    [
        'def f() -> bool:\n    """Return whether it is there."""\n',
        'a: bool = True\n"""Whether it is there."""\n',
        'class A:\n    @property\n    def b(self):\n        """Number of ranks."""\n',
        'def f(x):\n    """log(1 + e^x), without overflow."""\n',
        'MESSAGE = "told you so, in vain"\n',
    ],
)
def test_good_prose_has_no_fault(tmp_path, text):
    path = tmp_path / "module.py"
    path.write_text(text)
    assert list(prose.findings(path)) == []


def test_a_page_is_read_without_its_code_and_its_quotations(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("A command that told\n\n```bash\necho told anew\n```\n\nThe word `anew` is old.\n")
    assert [line for line, _ in prose.findings(page)] == [1]


def test_the_project_has_no_fault():
    assert [f"{path}: {message}" for path in prose.files([]) for _, message in prose.findings(path)] == []
