"""Build ranks of a run without its memory, as `megadiff dry_run` does."""

from megadiff.cli.dry_run import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
