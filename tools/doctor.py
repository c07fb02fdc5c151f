"""Examine this machine, and a run description on it, as `megadiff doctor` does."""

from megadiff.cli.doctor import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
