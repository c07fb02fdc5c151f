"""Fit scaling laws to the runs of a sweep, as `megadiff fit_scaling` does."""

from megadiff.cli.fit_scaling import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
