"""Show the curves of one or more runs, as `megadiff plot_run` does."""

from megadiff.cli.plot_run import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
