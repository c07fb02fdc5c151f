"""Start cooldowns of several lengths from one checkpoint of a run that is still at its stable learning rate."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from megadiff.config.command_line import CommandParser
from megadiff.errors import ConfigError, MegadiffError, run_command

_EPILOG = """example:
  python tools/branch_cooldowns.py --config examples/demo.yaml --trunk runs/demo/checkpoints/step_00000120 \\
      --lengths 50 100 200 --launcher "torchrun --standalone --nproc-per-node 8"

Each branch is a run of its own, NAME-cooldown-LENGTH, that a second call of the same command continues.
"""


def main() -> None:
    """Run one branch after the other, or print their commands."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--config", type=Path, required=True, help="the trunk's YAML file")
    parser.add_argument("--trunk", type=Path, required=True, help="the step_* folder to branch from")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="steps of each cooldown")
    parser.add_argument("--launcher", default=sys.executable, help="what starts the ranks (default: this Python)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings over the file's")
    arguments = parser.parse_args()

    from megadiff.checkpoint.manifest import read_manifest
    from megadiff.config.load import load_config
    from megadiff.run_config import RunConfig

    config = load_config(arguments.config, arguments.set, RunConfig)
    manifest = read_manifest(arguments.trunk)
    step = manifest.step
    if min(arguments.lengths) < 1:
        raise ConfigError(f"--lengths are steps of a cooldown, at least 1, found {min(arguments.lengths)}")
    trunk = RunConfig.model_validate(manifest.config).lr_schedule()
    first, last = trunk.warmup_steps, trunk.steps - trunk.cooldown_steps
    if not first <= step <= last:
        raise ConfigError(
            f"{arguments.trunk} is at step {step}, outside its run's stable stretch of steps {first} to {last}; branch "
            "from a checkpoint inside it"
        )
    program = Path(__file__).resolve().parent.parent / "pretrain_dlm.py"
    for length in arguments.lengths:
        command = [
            *shlex.split(arguments.launcher),
            str(program),
            "--config",
            str(arguments.config),
            *arguments.set,
            f"name={config.name}-cooldown-{length}",
            f"checkpoint.start_from={arguments.trunk}",
            "schedule.tokens=",
            "schedule.flops=",
            f"schedule.steps={step + length}",
            f"schedule.cooldown={length}",
        ]
        print("$ " + shlex.join(command), flush=True)
        if not arguments.dry_run and subprocess.run(command, check=False).returncode:
            raise MegadiffError(f"the cooldown of {length} steps failed; its message is above")


if __name__ == "__main__":
    run_command(main)
