"""Start cooldowns of several lengths from one checkpoint, taken at the stable learning rate."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megadiff.config.command_line import CommandParser
from megadiff.errors import CheckpointError, ConfigError, MegadiffError

if TYPE_CHECKING:
    from megadiff.checkpoint.manifest import Manifest

_EPILOG = """example:
  megadiff branch_cooldowns --trunk runs/demo --lengths 50 100 200 \\
      --launcher "torchrun --standalone --nproc-per-node 8"

The branches have the trunk's own settings as recorded in its checkpoint, whatever file and overrides it was started
with; --set changes some of them. Each branch is a run of its own, NAME-cooldown-LENGTH, which a second call of the same
command continues.
"""


def main() -> None:
    """Run one branch after the other, or print their commands."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--trunk",
        type=Path,
        required=True,
        help="the step_* folder to branch from, or a run folder: its last checkpoint before the cooldown",
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="optional YAML file; its differences from the trunk are printed, and --allow-data-change uses its data",
    )
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="steps of each cooldown")
    parser.add_argument(
        "--launcher", default=sys.executable, help="command that starts the ranks (default: this Python)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the commands and write their settings")
    parser.add_argument(
        "--allow-data-change",
        action="store_true",
        help="use other training data than the trunk's; every source continues at its own next sequence",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings that replace the trunk's")
    arguments = parser.parse_args()
    if min(arguments.lengths) < 1:
        raise ConfigError(f"--lengths are steps of a cooldown, at least 1, found {min(arguments.lengths)}")

    folder, manifest = _trunk(arguments.trunk)
    settings = dict(manifest.config)
    if arguments.config is not None:
        settings = _compared(arguments.config, manifest, takes_data=arguments.allow_data_change)
    script = Path(__file__).resolve().parents[2] / "pretrain_dlm.py"  # an installed package does not have it
    program = [str(script)] if script.is_file() else ["-m", "megadiff", "train"]
    for length in arguments.lengths:
        path = _write_settings(settings, folder, manifest.step, arguments.set, length)
        command = [*shlex.split(arguments.launcher), *program, "--config", str(path)]
        command += ["--allow-data-change"] if arguments.allow_data_change else []
        print("$ " + shlex.join(command), flush=True)
        if not arguments.dry_run and subprocess.run(command, check=False).returncode:
            raise MegadiffError(f"the cooldown of {length} steps failed; its message is above")


def _trunk(path: Path) -> tuple[Path, Manifest]:
    """Return the checkpoint to branch from, and its manifest.

    Raises:
        CheckpointError: there is none, or it is not in the stable phase; the message names those that are.
    """
    from megadiff.checkpoint.folder import step_folders
    from megadiff.checkpoint.manifest import no_checkpoint, read_manifest

    is_run = (path / "checkpoints").is_dir()
    if not is_run and path.absolute().parent.name != "checkpoints":
        raise CheckpointError(no_checkpoint(path))
    run_folder = path if is_run else path.absolute().parent.parent
    found = _branchable(step_folders(run_folder))
    if is_run and found:
        path = found[0]
    elif is_run or not path.exists():
        what = "holds no checkpoint to branch from" if is_run else "does not exist"
        raise CheckpointError(f"{path} {what}; {_what_there_is(run_folder, found)}")
    manifest = read_manifest(path)
    first, last = _stable_stretch(manifest)
    if not first <= manifest.step <= last:
        raise CheckpointError(
            f"{path} is at step {manifest.step}, outside its run's stable stretch of steps {first} to {last}; "
            f"{_what_there_is(run_folder, found)}"
        )
    return path, manifest


def _branchable(folders: list[Path]) -> list[Path]:
    """Return the checkpoints in the stable phase of the learning rate, newest first."""
    from megadiff.checkpoint.manifest import read_manifest

    found = []
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            first, last = _stable_stretch(manifest)
        except MegadiffError:
            continue
        if first <= manifest.step <= last:
            found.append(folder)
    return found


def _stable_stretch(manifest: Manifest) -> tuple[int, int]:
    """Return the first and the last step after which the learning rate is at its peak.

    Raises:
        CheckpointError: the manifest does not describe a run of this version.
    """
    from pydantic import ValidationError

    from megadiff.run.config import RunConfig

    try:
        schedule = RunConfig.model_validate(manifest.config).lr_schedule()
    except ValidationError as error:
        raise CheckpointError(
            f"the trunk's settings are not of this version ({str(error).splitlines()[0]}); branch with the version "
            "that trained it"
        ) from None
    return schedule.warmup_steps, schedule.steps - schedule.decay_steps


def _what_there_is(run_folder: Path, branchable: list[Path]) -> str:
    from megadiff.checkpoint.folder import step_folders

    if branchable:
        return f"checkpoints of {run_folder} in its stable stretch: {', '.join(path.name for path in branchable)}"
    names = [path.name for path in step_folders(run_folder)]
    if not names:
        return f"{run_folder / 'checkpoints'} holds no checkpoint; give a run folder or one of its step_* folders"
    return (
        f"{run_folder / 'checkpoints'} holds {', '.join(names)}, none of them in the stable stretch; train the trunk "
        "again with checkpoint.every below the length of that stretch"
    )


def _write_settings(settings: dict[str, Any], trunk: Path, step: int, overrides: list[str], length: int) -> Path:
    """Write the trunk's settings with this cooldown into the branch's run folder; return the file."""
    import yaml

    from megadiff.config.load import dump_config, load_config
    from megadiff.files import write_atomically
    from megadiff.run.config import RunConfig

    tree = dict(settings)
    tree["name"] = f"{tree['name']}-cooldown-{length}"
    tree["checkpoint"] = {**tree["checkpoint"], "start_from": str(trunk.absolute()), "weights_only": False}
    steps = {"steps": step + length, "decay_steps": length, "tokens": None, "flops": None}
    tree["schedule"] = {**tree["schedule"], **steps}
    tree["eval"] = {**tree["eval"], **_evaluations_until(settings, step + length)}
    with TemporaryDirectory() as place:
        before = Path(place) / "trunk.yaml"
        before.write_text(yaml.safe_dump(tree), encoding="utf-8")
        config = load_config(before, overrides, RunConfig)
    path = config.folder / "branch.yaml"
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump_config(config))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error}); choose another place with --set output_dir=..."
        ) from None
    return path


def _evaluations_until(settings: dict[str, Any], last: int) -> dict[str, list[float]]:
    """Return the trunk's evaluations at named steps and budgets that a run of `last` steps reaches."""
    from megadiff.run.config import RunConfig

    trunk = RunConfig.model_validate(settings)
    return {
        "at_steps": [step for step in trunk.eval.at_steps if step <= last],
        "at_flops": [flops for flops in trunk.eval.at_flops if trunk.step_of_flops(flops) <= last],
    }


def _compared(config: Path, manifest: Manifest, *, takes_data: bool) -> dict[str, Any]:
    """Return the trunk's settings, with the file's data if these are wanted.

    All other differences are printed, so that nobody believes the branches were trained with the file's settings.
    """
    from megadiff.checkpoint.manifest import differences
    from megadiff.config.load import load_config
    from megadiff.run.config import RunConfig
    from megadiff.run.resume import of_this_version

    wanted = load_config(config, [], RunConfig).model_dump(mode="json", by_alias=True)
    for change in differences(of_this_version(manifest), wanted):
        if takes_data and change.key.partition(".")[0] == "data":
            continue
        print(f"the trunk had {change.key} {change.before!r}, {config} has {change.now!r}; the trunk's is used")
    return {**manifest.config, "data": wanted["data"]} if takes_data else dict(manifest.config)
