"""Repeat one step of a run in one CPU process, as `megadiff replay` does."""

from megadiff.cli.replay import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
