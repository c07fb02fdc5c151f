"""Dry runs in a process of their own, for commands that only need to know whether a run fits. No torch on import.

`megadiff.run.dry_run` prepares megatron-core for a CPU in its process, which must not happen to a process that looks
at GPUs. This module is both sides: `dry_runs` starts a process of this file, which reads descriptions and writes
answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megadiff.config.load import dump_config, load_config
from megadiff.errors import MegadiffError
from megadiff.run.config import RunConfig
from megadiff.run.summary import has_fused_layers

if TYPE_CHECKING:
    from megadiff.run.dry_run import RankReport


@dataclass(frozen=True)
class Fullest:
    """The rank that needs most memory, of the first and the last pipeline stage."""

    rank: int
    total_bytes: int
    """Bytes of the run as configured: what was built, and what the closed form adds for parts that were not."""
    not_built: str
    """Names of these parts; empty if there are none."""


@dataclass(frozen=True)
class Refused:
    """A run that a dry run refuses, as the trainer would."""

    sentence: str


def fullest_rank(config: RunConfig, *, ranks: int) -> Fullest:
    """Return the fullest of the ranks that a dry run in this process builds.

    Raises:
        MegadiffError: the dry run refuses the run.
    """
    from megadiff.run.dry_run import dry_run

    found: Sequence[RankReport] = dry_run(config, world_size=ranks, chosen=None).ranks
    report = max(found, key=lambda each: each.needed)
    return Fullest(report.rank, report.needed, report.not_built)


def load_engine(configs: Iterable[RunConfig]) -> None:
    """Load Transformer Engine's Python part in this process, if one of the runs has its layers and it is there.

    To be called before megatron-core is imported, and so before `megadiff.run.dry_run`.
    """
    from megadiff.platform import engine_on_meta

    is_wanted = any(has_fused_layers(config) for config in configs) or engine_on_meta.is_needed()
    if is_wanted and engine_on_meta.problem() is None:
        engine_on_meta.install()


def dry_runs(runs: Sequence[tuple[RunConfig, int]], *, limit_s: float) -> list[Fullest | Refused] | None:
    """Return the fullest rank of each run on its number of ranks; None if there is no answer within the limit.

    Takes about eight CPU seconds for starting, and one or two for a run.
    """
    with TemporaryDirectory() as folder:
        for number, (config, _) in enumerate(runs):
            Path(folder, f"{number}.yaml").write_text(dump_config(config), encoding="utf-8")
        command = [sys.executable, "-m", __name__, folder, *(str(ranks) for _, ranks in runs)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            env.pop(variable, None)
        try:
            ended = subprocess.run(command, env=env, capture_output=True, timeout=limit_s, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
    if ended.returncode != 0:
        return None
    return [_answer(line) for line in json.loads(ended.stdout.splitlines()[-1])]


def _answer(line: Mapping[str, Any]) -> Fullest | Refused:
    return Refused(**line) if "sentence" in line else Fullest(**line)


def loaded(path: Path) -> RunConfig | Refused:
    """Return a description, or why it cannot be read."""
    try:
        return load_config(path, [], RunConfig)
    except MegadiffError as error:
        return Refused(str(error))


def _main(folder: str, *ranks: str) -> None:
    """Write one line of JSON with an answer for every description in a folder."""
    from megadiff.platform.quiet import quiet

    answers: list[Fullest | Refused] = []
    with quiet():
        configs = [loaded(Path(folder, f"{number}.yaml")) for number in range(len(ranks))]
        load_engine([config for config in configs if isinstance(config, RunConfig)])
        for config, world_size in zip(configs, ranks, strict=True):
            try:
                is_read = isinstance(config, RunConfig)
                answers.append(fullest_rank(config, ranks=int(world_size)) if is_read else config)
            except MegadiffError as error:
                answers.append(Refused(str(error)))
    sys.stdout.write(json.dumps([asdict(answer) for answer in answers]) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
