"""Write one HTML page about one or more runs, as `megadiff report` does."""

from megadiff.cli.report import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
