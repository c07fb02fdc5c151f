"""Time that training pauses for a checkpoint, written in the background or in the foreground."""

from __future__ import annotations

import os
import platform as host
import statistics
import tempfile
import time
from pathlib import Path

from made_up import describe_made_up, prepare_made_up

from megadiff.config.command_line import CommandParser
from megadiff.errors import run_command

_EPILOG = """example:
  OMP_NUM_THREADS=1 python tools/benchmarks/checkpoint_stall.py --saves 7

One CPU process trains a model of 25 million parameters (float32, AdamW: 12 bytes per parameter are saved). Background
and foreground saves alternate. A "pause" is the time between two steps that a save takes: the copy to host memory, the
polls and the completion. "steps beside it" shows how much longer steps take while the writer thread works.
"""

_DESCRIPTION = {
    "platform": "cpu",
    "model": {"layers": 8, "hidden": 512, "heads": 8, "seq_length": 128},
    "batch": {"global_batch_size": 1, "micro_batch_size": 1},
    "precision": {"compute": "fp32"},
    "optimizer": {"name": "adamw", "lr": 1e-4},
    "schedule": {"steps": 10_000},
    "log": {"tensorboard": False},
}


def main() -> None:
    """Switch between both kinds of save in one training run and print the table."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--saves", type=int, default=5, help="saves of each kind (default 5)")
    parser.add_argument("--output", type=Path, help="folder on the disk to measure (default: the temporary folder)")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=arguments.output) as folder:
        _measure(Path(folder), saves=arguments.saves)


def _measure(folder: Path, *, saves: int) -> None:
    from megadiff.platform.machine import detect
    from megadiff.platform.quiet import quiet

    with quiet():
        from megadiff.run import build
    from megadiff.parallel.topology import process_group
    from megadiff.train.hooks.checkpoint import CheckpointHook

    config = describe_made_up(folder, _DESCRIPTION, vocab_size=260)
    platform = detect("cpu")
    with process_group(platform, alone=True):
        platform.prepare_megatron()
        with quiet():
            run = build.build_trainer(prepare_made_up(config, vocab_size=260), platform)
        hook = next(hook for hook in run.hooks if isinstance(hook, CheckpointHook))
        saver, manifest = hook.checkpointer, hook.manifest
        stood: dict[str, list[float]] = {"background": [], "foreground": []}
        alone: list[float] = []
        beside: list[float] = []
        done = 0

        def step() -> float:
            nonlocal done
            began = time.monotonic()
            run.step([next(run.microbatches)], 1e-4)
            done += 1
            return time.monotonic() - began

        for number in range(2 * saves + 1):
            alone += [step() for _ in range(3)]
            is_background = number % 2 == 0
            outcome = saver.start(manifest(done))
            assert outcome is None, outcome
            while is_background and (outcome := saver.poll()) is None:
                beside.append(step())
            outcome = outcome or saver.finish()
            assert outcome is not None
            assert outcome.error is None, outcome.error
            if number:  # the first save allocates the host buffers
                stood["background" if is_background else "foreground"].append(outcome.stall_s)
            written = sum(path.stat().st_size for path in outcome.folder.iterdir())
        run.close()
    _report(stood, alone, beside, written)


def _report(stood: dict[str, list[float]], alone: list[float], beside: list[float], written: int) -> None:
    background, foreground = (statistics.median(stood[kind]) for kind in ("background", "foreground"))
    print(f"machine            {host.processor() or host.machine()}, {os.cpu_count()} cores; one process, one thread")
    print(f"checkpoint         {written / 1e6:.0f} MB")
    print(f"foreground pause   {foreground:.3f} s (median of {len(stood['foreground'])})")
    print(f"background pause   {background:.3f} s (median of {len(stood['background'])})")
    print(f"ratio              {background / foreground:.3f}")
    longer = statistics.median(beside) / statistics.median(alone)
    print(f"steps beside it    {longer:.2f} times as long ({len(beside)})")


if __name__ == "__main__":
    run_command(main)
