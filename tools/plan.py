"""Plan a run from a budget and scaling laws, as `megadiff plan` does."""

from megadiff.cli.plan import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
