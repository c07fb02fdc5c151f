"""Check indexed data, as `megadiff check_data` does."""

from megadiff.cli.check_data import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
