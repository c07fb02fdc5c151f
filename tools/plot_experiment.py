"""Compare the runs of an experiment by one of their settings, as `megadiff plot_experiment` does."""

from megadiff.cli.plot_experiment import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
