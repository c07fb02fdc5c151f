"""Build chosen ranks of any layout without their memory, and print what they hold and exchange."""

from __future__ import annotations

from pathlib import Path

_EPILOG = """examples:
  megadiff dry_run --config run.yaml --ranks 1024
  megadiff dry_run --config run.yaml --ranks 1024 --all-stages parallel.tensor=8
  megadiff dry_run --config run.yaml --ranks 64 --rank 0 --rank 63

It needs no GPU and no data, half a gigabyte of memory, and some seconds for each rank. A layout that the trainer would
refuse is refused here.
"""


def main() -> None:
    """Read the run description, build the ranks and print the report."""
    from megadiff.config.command_line import SettingsParser, refuse_unknown

    parser = SettingsParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="number of ranks of the run")
    parser.add_argument(
        "--rank",
        type=int,
        action="append",
        metavar="R",
        help="build this rank; may be repeated (default: one rank of the first and one of the last pipeline stage)",
    )
    parser.add_argument(
        "--all-stages", action="store_true", help="build the first and the last tensor rank of every pipeline stage"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write every figure, in bytes, as JSON")
    arguments = parser.parse_with_settings()

    from megadiff.config.load import load_config
    from megadiff.errors import ConfigError
    from megadiff.files import write_atomically
    from megadiff.run.config import RunConfig

    refuse_unknown(arguments, RunConfig)
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, got {arguments.ranks}")
    if arguments.rank and arguments.all_stages:
        raise ConfigError("--rank and --all-stages exclude each other; leave one of them out")
    config = load_config(arguments.config, arguments.overrides, RunConfig)

    from megadiff.platform.quiet import quiet
    from megadiff.run.dry_runs import load_engine

    with quiet():
        load_engine([config])
        from megadiff.run.dry_run import as_json, describe, dry_run

        found = dry_run(config, world_size=arguments.ranks, chosen=arguments.rank, all_stages=arguments.all_stages)
    if arguments.output is not None:
        write_atomically(arguments.output, as_json(found) + "\n")
    print("\n".join(describe(found)))
