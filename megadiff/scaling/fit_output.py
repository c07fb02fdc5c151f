"""The files of a fit: the law file, all that was found as JSON, and tables of the points and of what was left out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megadiff.files import write_atomically
from megadiff.scaling.fit_record import law_file, record, written_laws
from megadiff.scaling.fit_results import Results
from megadiff.scaling.laws import write_law_file
from megadiff.scaling.points import Gathered

_COLUMNS = ("run", "noise", "flops", "flops_per_token", "tokens", "params", "loss", "loss_stderr", "batch_tokens",
            "learning_rate", "seed", "unique_tokens", "excluded")  # fmt: skip


def write_fit(results: Results, folder: Path) -> dict[str, Any]:
    """Write `law.yaml`, `fit.json`, `points.csv` and `excluded.csv` into a folder; return the content of `fit.json`.

    Raises:
        OSError: the folder cannot be written.
        FitError: there is no law that a law file can hold.
    """
    name = folder.resolve().name or "fits"
    written = written_laws(results)
    laws = law_file(results, name, written)
    found = record(results, laws, written)
    folder.mkdir(parents=True, exist_ok=True)
    write_law_file(folder / "law.yaml", laws)
    write_atomically(folder / "fit.json", json.dumps(found, indent=1) + "\n")
    write_points(results.gathered, folder)
    return found


def write_points(gathered: Gathered, folder: Path) -> None:
    """Write `points.csv` and `excluded.csv` into a folder, which need no law.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "points.csv", _points_table(gathered))
    excluded = [["run", "reason", "detail"], *([e.run, e.reason, e.detail] for e in gathered.excluded)]
    write_atomically(folder / "excluded.csv", _as_csv(excluded))


def _points_table(gathered: Gathered) -> str:
    """Return all points, and a row with the reason for each run that has none."""
    rows: list[list[Any]] = [list(_COLUMNS)]
    rows += [["" if (v := getattr(point, name)) is None else v for name in _COLUMNS] for point in gathered.points]
    reasons = {found.run: f"{found.reason}: {found.detail}" for found in gathered.excluded}
    rows += [[run, *[""] * (len(_COLUMNS) - 2), reason] for run, reason in reasons.items()]
    return _as_csv(rows)


def _as_csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
