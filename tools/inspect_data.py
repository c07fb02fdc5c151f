"""Look at data, as `megadiff inspect_data` does."""

from megadiff.cli.inspect_data import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
