"""Check that a parametrisation keeps activations and updates of equal size, as `megadiff coordinate_check` does."""

from megadiff.cli.coordinate_check import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
