"""The table of layouts and versions: its rows, the page's own figures, and what a page needs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY
from tests.support.forked_command import call_forked

SCRIPT = "tools/benchmarks/layout_parity.py"


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools/benchmarks")
    import layout_parity

    yield layout_parity
    del sys.modules["layout_parity"]


def _row(parity, python: str, core: str, figure: str) -> list[str]:
    return [python, core, "2.13.0", "0.8", *([figure] * len(parity.LAYOUTS))]


def test_a_row_replaces_that_of_the_same_versions_and_rows_are_in_order(parity) -> None:
    page = f"above\n{parity.BEGIN}\n\n{parity.END}\nbelow\n"
    for python, core, figure in (("3.12.1", "0.19.2", "1"), ("3.9.18", "0.19.2", "2"), ("3.12.1", "0.19.2", "3")):
        page = parity.with_row(page, _row(parity, python, core, figure))
    assert page.startswith(f"above\n{parity.BEGIN}\n\n| Python |")
    assert page.endswith(f"\n\n{parity.END}\nbelow\n")
    rows = [line for line in page.splitlines() if line.startswith("| 3")]
    assert [row.split("|")[1].strip() for row in rows] == ["3.9.18", "3.12.1"]
    assert "| 3 |" in rows[1]


def test_the_difference_is_the_largest_of_any_step_and_figure(parity) -> None:
    assert parity.largest_difference([(1.0, 2.0), (4.0, 8.0)], [(1.0, 2.0), (4.0, 7.0)]) == 0.125
    with pytest.raises(ValueError, match="zip"):
        parity.largest_difference([(1.0, 2.0)], [(1.0, 2.0), (4.0, 8.0)])


def test_the_page_has_both_cores_and_no_large_difference(parity) -> None:
    inside = (REPOSITORY / "docs/parallelism.md").read_text().split(parity.BEGIN)[1].split(parity.END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in inside.splitlines() if line[2:3] == "3"]
    found = {(row[0].rpartition(".")[0], row[1]) for row in rows}
    assert found >= {("3.11", "0.16.1"), ("3.11", "0.19.2"), ("3.12", "0.19.2")}
    for row in rows:
        assert len(row) == 4 + len(parity.LAYOUTS)
        assert max(float(cell) for cell in row[4:]) < 1e-5


def test_a_page_without_a_place_for_the_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("a page\n")
    for page, sentence in (("page.md", "has no lines `<!-- layout parity -->`"), ("none.md", "cannot be read")):
        ended = call_forked(SCRIPT, "--page", tmp_path / page)
        assert ended.code == 2
        assert sentence in ended.err
