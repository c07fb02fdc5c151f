"""Start cooldowns of several lengths from one checkpoint, as `megadiff branch_cooldowns` does."""

from megadiff.cli.branch_cooldowns import main
from megadiff.errors import run_command

if __name__ == "__main__":
    run_command(main)
