"""Train a tokenizer, as `megadiff train_tokenizer` does."""

from megadiff.cli.train_tokenizer import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
