"""Measure a trained model: `tools/evaluate.py elbo --model RUN --data PREFIX`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megadiff.errors import ConfigError, run_command

_EPILOG = """example:
  python tools/evaluate.py elbo --model runs/demo --data data/valid --rows 128 --noise-levels 8 --output elbo.json
"""


def main() -> None:
    """Read the command line, measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=["elbo"], help="the held-out evidence bound")
    parser.add_argument("--model", required=True, help="a run folder, or one checkpoints/step_* folder of it")
    parser.add_argument("--data", required=True, help="prefix of indexed data (PREFIX.bin, PREFIX.idx)")
    parser.add_argument("--rows", type=_at_least_two, default=256, help="held-out rows (default 256)")
    parser.add_argument("--noise-levels", type=_positive, default=8, help="noise levels per row (default 8)")
    parser.add_argument("--micro-sequences", type=_positive, default=8, help="rows per forward pass (default 8)")
    parser.add_argument("--tokenizer", help="tokenizer path, where the run's own has moved")
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--output", type=Path, help="also write the result here as JSON")
    arguments = parser.parse_args()
    if arguments.output and not arguments.output.parent.is_dir():
        raise ConfigError(f"--output {arguments.output}: there is no folder {arguments.output.parent}; make it first")

    from megadiff.platform.quiet import quiet

    with quiet():
        from megadiff.trained import open_trained

    with open_trained(arguments.model, platform=arguments.platform, tokenizer=arguments.tokenizer) as trained:
        found = trained.held_out_elbo(
            arguments.data,
            rows=arguments.rows,
            noise_levels=arguments.noise_levels,
            micro_sequences=arguments.micro_sequences,
        )
        print(f"{trained.folder}: {found.describe()}")
        for low, high, value in found.by_log_snr:
            print(f"  log-SNR {low:+.0f} to {high:+.0f}: {value:.4f} nats")
        if arguments.output:
            line = {"model": str(trained.folder), "step": trained.manifest.step, **found.as_metrics()}
            arguments.output.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _at_least_two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2 for a standard error, got {value}")
    return value


if __name__ == "__main__":
    run_command(main)
