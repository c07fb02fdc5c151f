"""Pretrain a diffusion language model, as `megadiff train` does."""

from megadiff.cli.train import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
