"""Write, train and watch the runs of a scaling sweep, as `megadiff sweep` does."""

from megadiff.cli.sweep import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
