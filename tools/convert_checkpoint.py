"""Convert a training checkpoint to a Hugging Face folder, or back, as `megadiff convert_checkpoint` does."""

from megadiff.cli.convert_checkpoint import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
