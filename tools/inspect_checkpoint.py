"""Verify a checkpoint and show its contents, as `megadiff inspect_checkpoint` does."""

from megadiff.cli.inspect_checkpoint import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
