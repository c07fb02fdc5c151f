"""Examine this machine, and a run description on it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megadiff.errors import ConfigError

_EPILOG = """examples:
  megadiff doctor
  megadiff doctor --config examples/demo.yaml --ranks 8 parallel.tensor=4
  srun -N 1 -n 1 megadiff doctor --config my.yaml --ranks 512 --json > doctor.json

The exit code is 0 if no check fails, otherwise 2.
"""


def main() -> None:
    """Read the command line, run the checks, and report."""
    from megadiff.config.command_line import SettingsParser, refuse_unknown

    parser = SettingsParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--config", type=Path, help="the run's YAML file; without it only the machine is examined")
    parser.add_argument("--ranks", type=int, help="ranks of the run over all nodes (default: this launch's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    arguments = parser.parse_with_settings()
    if arguments.ranks is not None and arguments.ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {arguments.ranks}")
    if arguments.overrides and arguments.config is None:
        raise ConfigError(f"`{arguments.overrides[0]}` changes a run description, but none is given; add --config FILE")

    from rich.console import Console

    from megadiff.config.load import load_config
    from megadiff.doctor import examination
    from megadiff.doctor.examination import Subject, examine
    from megadiff.run.config import RunConfig

    refuse_unknown(arguments, RunConfig)
    config, problem = None, None
    if arguments.config is not None:
        try:
            config = load_config(arguments.config, arguments.overrides, RunConfig)
        except ConfigError as error:
            problem = str(error)
    findings = list(examine(Subject(os.environ, config, problem, arguments.ranks)))
    if arguments.json:
        print(examination.as_json(findings))
    else:
        examination.show(findings, Console())
        if arguments.config is None:
            print("give --config to examine a run too: description, tokenizer, data, layout, memory and disk space")
    sys.exit(2 if examination.has_failed(findings) else 0)
