"""Evaluate a trained model, as `megadiff evaluate` does."""

from megadiff.cli.evaluate import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
