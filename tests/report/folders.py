"""Run folders written by hand, for what a toy run does not do: skip, spike, be killed, stand still."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BINS = [[-9.0, -6.0, 0.1], [-6.0, -3.0, 0.25]]


def training_line(step: int, **changed: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl`, 64 tokens a step."""
    line = {"step": step, "tokens": 64 * step, "loss": 4.0 / step, "elbo": 5.0 / step, "grad_norm": 1.0, "lr": 1e-3}
    return {**line, "tokens_per_s": 1000.0, "peak_bytes": 2**30, "loss_by_log_snr": BINS, **changed}


def evaluation_line(step: int, elbo: float = 3.25, **changed: Any) -> dict[str, Any]:
    """An evaluation line."""
    line = {"step": step, "eval_elbo": elbo, "eval_elbo_stderr": 0.125, "eval_bits_per_byte": 4.5}
    return {**line, "eval_loss_by_log_snr": BINS, "eval_elbo_by_source": {"valid": [elbo, 0.125]}, **changed}


def write_run(folder: Path, lines: list[dict[str, Any]], *, tail: str = "") -> Path:
    """A run folder of these lines; `tail` follows the last one as it is."""
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder
