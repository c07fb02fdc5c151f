"""Tokenize a corpus into indexed binaries, as `megadiff preprocess_data` does."""

from megadiff.cli.preprocess_data import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
