"""Points of a sweep from a CSV file with named columns."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megadiff.errors import DataError
from megadiff.scaling.flops import FlopCount
from megadiff.scaling.points import COLUMNS, REASONS, Exclusion, Gathered, Point, best_of_settings, without_repeats
from megadiff.untrusted_files import UnreadableFileError, read_text, why

_MAX_CSV_BYTES, _MAX_CSV_ROWS = 2**26, 200_000
_MAX_HEAD = 100_000
_NUMBERS = ("flops", "tokens", "flops_per_token", "params", "loss", "loss_stderr", "batch_tokens", "learning_rate",
            "unique_tokens")  # fmt: skip


def from_csv(path: Path, names: Mapping[str, str] | None = None, *, flop_count: FlopCount | None = None) -> Gathered:
    """Gather the points of a CSV file, a point a row, none at all if no row can be used.

    Args:
        path: the file; its first row names the columns.
        names: the file's name of each column of `COLUMNS` that is called otherwise or has another unit; `N*1e6` is the
            column N in units of a million.
        flop_count: count of the file's FLOPs; `chinchilla` takes FLOPs per token as 6 times the parameters. None takes
            it where parameters are all that says the size or agree with the FLOPs, and `deepseek` otherwise.

    Raises:
        DataError: the file cannot be read, or lacks columns.
    """
    rows = _rows(path)
    head = list(rows[0][1]) if rows else []
    known, factors = _named(path, names or {}, head)
    has = {own for own, name in known.items() if name in head}
    is_by_size = bool(has & {"flops_per_token"}) or {"flops", "tokens"} <= has
    count: FlopCount = flop_count or ("deepseek" if is_by_size else "chinchilla")
    if "loss" not in has or len(has & {"flops", "tokens", "flops_per_token"}) + ("params" in has) < 2:
        raise DataError(
            f"{path} needs a column loss and two of flops, tokens and flops_per_token (or params), found "
            f"{', '.join(head[:12])}; --columns gives the names of others, as in --columns loss=final_loss"
        )
    points, excluded = [], []
    seen: dict[tuple[Any, ...], str] = {}
    for line, row in rows:
        values = {own: (row.get(known[own]) or "").strip() for own in has}
        run = values.get("run") or f"row {line}"
        reason, point = _point_of(values, run, count, factors)
        if point is not None:
            key = (point.run, point.noise, point.flops, point.flops_per_token, point.seed) if "run" in has else (
                point.noise, point.flops, point.flops_per_token, point.loss, point.batch_tokens, point.learning_rate,
                point.seed,
            )  # fmt: skip
            if key in seen:
                reason, point = ("duplicate", f"line {line} repeats {seen[key]}"), None
            else:
                seen[key] = f"line {line}"
        if point is None and reason is not None:
            excluded.append(Exclusion(run, *reason))
        elif point is not None:
            points.append(point)
    dropped = {found.run for found in excluded if found.reason not in ("duplicate",)} if "run" in has else set()
    points = [point for point in points if point.run not in dropped]
    unique = list({(found.run, found.reason): found for found in excluded}.values())
    runs = len({point.run for point in points} | {found.run for found in unique})
    if flop_count is None and points and all(_is_by_parameters(point) for point in points):
        count = "chinchilla"
    source = path.name if "run" in has else f"{path.name}, each row a run of its own"
    return Gathered(tuple(best_of_settings(without_repeats(points))), tuple(unique), count, source, runs)


def _is_by_parameters(point: Point) -> bool:
    """Return whether a point's FLOPs are 6 times parameters times tokens."""
    return point.params is not None and abs(point.flops_per_token / (6 * point.params) - 1) < 0.01


def _named(path: Path, names: Mapping[str, str], head: Sequence[str]) -> tuple[dict[str, str], dict[str, float]]:
    """Return the file's name of each column, and the factors of those in other units."""
    known, factors = {own: own for own in COLUMNS}, {}
    for own, name in names.items():
        if own not in COLUMNS:
            raise DataError(f"--columns {own}={name}: the columns are {', '.join(COLUMNS)}")
        if name not in head:
            name, _, factor = name.rpartition("*")
            try:
                factors[own] = float(factor)
            except ValueError:
                name = names[own]
            name = name.strip()
            if not 0 < factors.get(own, 1.0) < math.inf or (own in factors and own not in _NUMBERS):
                raise DataError(f"--columns {own}={names[own]}: a factor is a positive number of a column of numbers")
        if name not in head:
            raise DataError(f"{path} has no column `{name}`; it has {', '.join(head[:12])}")
        known[own] = name
    return known, factors


def _separator(text: str) -> str:
    """Return the separator of the first line: a semicolon or a tab if it has them and no comma outside of quotes."""
    first = re.sub(r'"[^"]*"', "", text.split("\n", 1)[0][:_MAX_HEAD])
    return next((mark for mark in ";\t" if mark in first and "," not in first), ",")


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        text = read_text(path, max_bytes=_MAX_CSV_BYTES)
    except (OSError, UnreadableFileError) as error:
        raise DataError(f"{path} {why(error)}; give a CSV file with a row of names") from None
    if "\0" in text:
        raise DataError(f"{path} holds NUL characters; a CSV file is text")
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=_separator(text))
        head = [name.strip() for name in next(reader, [])]
        if not any(head):
            raise DataError(f"{path} is empty; its first row must name the columns")
        twice = [name for name, count in Counter(name for name in head if name).items() if count > 1]
        if twice:
            raise DataError(f"{path} names the column `{twice[0]}` twice")
        rows = []
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(head):
                raise DataError(f"{path}:{reader.line_num}: {len(row)} cells where the first row has {len(head)}")
            rows.append((reader.line_num, dict(zip(head, row, strict=True))))
            if len(rows) > _MAX_CSV_ROWS:
                raise DataError(f"{path} has more than {_MAX_CSV_ROWS:,} rows; give points, not whole curves")
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV file ({error})") from None
    if not rows:
        raise DataError(f"{path} has a row of names and nothing below it")
    return rows


def _point_of(
    values: Mapping[str, str], run: str, count: FlopCount, factors: Mapping[str, float]
) -> tuple[tuple[str, str] | None, Point | None]:
    status = values.get("status", "").lower()
    if status and status not in ("finished", "ok", "done", "complete", "completed"):
        reason = next((known for known in REASONS if known.lower() in status), "unfinished")
        return (reason, f"its status is {status[:40]}"), None
    found: dict[str, float | None] = {}
    for name in _NUMBERS:
        text = values.get(name, "")
        try:
            value = float(text) * factors.get(name, 1.0) if text else None
        except ValueError:
            return ("unreadable", f"its {name} is `{text[:40]}`, no number"), None
        if value is not None and (math.isnan(value) or math.isinf(value)):
            return ("diverged" if math.isinf(value) else "NaN", f"its {name} is {value}"), None
        if value is not None and value <= 0 and not (name == "loss_stderr" and value == 0):
            return ("unreadable", f"its {name} is {value:g}, not positive"), None
        found[name] = value
    size = found["flops_per_token"]
    if size is None and count == "chinchilla" and found["params"] is not None:
        size = 6 * found["params"]
    flops, tokens = found["flops"], found["tokens"]
    if flops is None and size is not None and tokens is not None:
        flops = size * tokens
    if size is None and flops is not None and tokens is not None:
        size = flops / tokens
    if tokens is None and flops is not None and size is not None:
        tokens = flops / size
    if flops is None or size is None or tokens is None or found["loss"] is None:
        if found["params"] is not None and size is None:
            return ("unreadable", f"parameters alone give no FLOPs per token by the count {count}"), None
        return ("unreadable", "it lacks a loss, or two of flops, tokens and flops_per_token"), None
    if not 0.98 < flops / (size * tokens) < 1.02:
        return ("unreadable", f"its flops are {flops / (size * tokens):.3g} times flops_per_token x tokens"), None
    return None, Point(
        run=run,
        noise=values.get("noise") or "all",
        flops=flops,
        flops_per_token=size,
        tokens=tokens,
        loss=found["loss"],
        loss_stderr=found["loss_stderr"],
        params=found["params"],
        batch_tokens=found["batch_tokens"],
        learning_rate=found["learning_rate"],
        seed=values.get("seed", ""),
        unique_tokens=found["unique_tokens"],
    )
