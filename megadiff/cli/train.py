"""Pretrain a diffusion language model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megadiff.supervision.launch import end_with_launcher

_EPILOG = """examples:
  megadiff train --config examples/demo.yaml --check --ranks 8
  megadiff train --keys noise
  torchrun --nproc-per-node 8 -m megadiff train --config examples/demo.yaml noise.shift=masked schedule.steps=500

Run the same command again after an interruption: it goes on from the run folder's last complete checkpoint.
"""


class _PrintKeys(argparse.Action):
    """Print the reference of the configuration's keys and exit, as `--help` does."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, prefix: Any, __: str | None = None) -> None:
        from megadiff.config.reference import plain_text
        from megadiff.run.config import RunConfig

        print(plain_text(RunConfig, prefix))
        parser.exit()


def main() -> None:
    """Read the run description, then check it or train."""
    end_with_launcher()
    from megadiff.config.command_line import SettingsParser, refuse_unknown

    parser = SettingsParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="PREFIX",
        action=_PrintKeys,
        help="print all configuration keys, or those that begin with PREFIX, and exit",
    )
    parser.add_argument("--check", action="store_true", help="resolve, print the derived numbers, and exit")
    parser.add_argument(
        "--ranks",
        type=int,
        help="with --check: number of ranks to lay out (default: this launch's, or the fewest that fit)",
    )
    parser.add_argument(
        "--strict-resume", action="store_true", help="refuse if the newest checkpoint is damaged, take no older one"
    )
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY", help="go on with another value of this setting"
    )
    parser.add_argument("--allow-data-change", action="store_true", help="go on with other training data")
    arguments = parser.parse_with_settings()

    from megadiff.config.load import load_config
    from megadiff.errors import ConfigError
    from megadiff.run.config import RunConfig

    refuse_unknown(arguments, RunConfig)
    config = load_config(arguments.config, arguments.overrides, RunConfig)
    if arguments.ranks is not None and not arguments.check:
        raise ConfigError(
            f"--ranks {arguments.ranks} lays a run out with --check; to train on several ranks, start them with "
            f"`torchrun --nproc-per-node {arguments.ranks} -m megadiff train ...`"
        )

    from megadiff.platform.quiet import quiet
    from megadiff.run.summary import NoLayoutError

    with quiet():
        from megadiff.parallel.topology import is_main_process
        from megadiff.run.resume import ResumeOptions

    resume_options = ResumeOptions(arguments.strict_resume, arguments.allow_change, arguments.allow_data_change)
    if arguments.check:
        from megadiff.run.check import check

        try:
            text = check(config, ranks=arguments.ranks, resume_options=resume_options)
        except NoLayoutError as error:
            if is_main_process():
                print("\n".join(error.sizes))
            raise
        if is_main_process():
            print(text)
        return
    with quiet():
        from megadiff.run import build
    from megadiff.supervision.process import age_s

    build.run(config, resume_options, before_s=age_s(os.getpid()))
