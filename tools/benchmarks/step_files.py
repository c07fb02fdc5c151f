"""List the package's files that one optimizer step of a toy run passes through, on one CPU rank.

The number is a measure of how much a reader has to open to follow a step. The batch, the step, its hooks with a line of
metrics, and the agreement about stopping are counted, in the thread of the step and in the loader's; evaluation, saving
and setting up are not.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from megadiff.config.command_line import CommandParser

_PACKAGE = Path(__file__).resolve().parents[2] / "megadiff"
_EPILOG = """example:
  OMP_NUM_THREADS=1 python tools/benchmarks/step_files.py
"""
_DESCRIPTION: dict[str, Any] = {
    "platform": "cpu",
    "model": {"layers": 2, "hidden": 32, "heads": 4, "seq_length": 16},
    "batch": {"global_batch_size": 8, "micro_batch_size": 4},
    "precision": {"compute": "fp32"},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"steps": 100, "warmup_steps": 1},
    "checkpoint": {"every": 1000},
    "log": {"every": 1},
}


class _Files:
    """Files whose functions were called while `is_counting`; a profile function for all threads."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.is_counting = False

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        if self.is_counting and event == "call":
            self.names.add(frame.f_code.co_filename)

    def of_package(self) -> list[str]:
        """Return the files of the package, relative to it, sorted."""
        found = (Path(name) for name in self.names)
        return sorted(str(path.relative_to(_PACKAGE)) for path in found if path.is_relative_to(_PACKAGE))


def main() -> None:
    """Take two steps to warm up, count the next three, and print the files."""
    CommandParser(description=__doc__, epilog=_EPILOG).parse_args()
    from megadiff.platform.quiet import quiet

    with tempfile.TemporaryDirectory() as folder, quiet():
        files = _count(Path(folder))
    print("\n".join(files))
    print(f"{len(files)} files")


def _count(folder: Path) -> list[str]:
    from made_up import describe_made_up, prepare_made_up

    from megadiff.parallel.topology import process_group
    from megadiff.platform.machine import detect
    from megadiff.run import build

    config = describe_made_up(folder, _DESCRIPTION, vocab_size=260)
    platform, files = detect("cpu"), _Files()
    with process_group(platform, alone=True):
        platform.prepare_megatron()
        threading.setprofile(files)
        trainer = build.build_trainer(prepare_made_up(config, vocab_size=260), platform)
        trainer.hooks = [hook for hook in trainer.hooks if hook is not trainer.checkpoint]
        reason = trainer.stop.reason

        def count_between_steps(is_requested: bool) -> str | None:
            files.is_counting = 2 <= taken[0] < 5
            taken[0] += 1
            sys.setprofile(files if files.is_counting else None)
            return "counted" if taken[0] > 5 else reason(is_requested)

        taken = [1]
        trainer.stop.reason = count_between_steps
        trainer.checkpoint.save_now = lambda step: None
        trainer.train()
        threading.setprofile(None)
    return files.of_package()


if __name__ == "__main__":
    main()
