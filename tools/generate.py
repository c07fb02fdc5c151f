"""Generate text with a trained model, as `megadiff generate` does."""

from megadiff.cli.generate import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
