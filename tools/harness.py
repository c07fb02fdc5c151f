"""Score a trained model on lm-evaluation-harness tasks, as `megadiff harness` does."""

from megadiff.cli.harness import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
