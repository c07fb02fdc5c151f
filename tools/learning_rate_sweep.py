"""Find the best learning rate at several widths and depths, as `megadiff learning_rate_sweep` does."""

from megadiff.cli.learning_rate_sweep import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
