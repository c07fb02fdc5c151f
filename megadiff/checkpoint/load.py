"""Loading of a checkpoint of any layout into this one, after every byte of it has been verified."""

from __future__ import annotations

import logging
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megadiff.checkpoint.folder import damaged, lost_since, newest_complete, set_aside, step_of, verify_files
from megadiff.checkpoint.safe_metadata import read_index, unpickle_plain_objects_only
from megadiff.checkpoint.save import SavableOptimizer, library_failures, main_rank_reports, model_key, sharded_state
from megadiff.errors import CheckpointError, StorageError
from megadiff.parallel.pipeline import ModelChunk
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform
from megadiff.platform.quiet import quiet

log = logging.getLogger("megadiff")

_MASTERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Prefixes that precede a parameter's name in the keys of float32 master weights."""


def newest_sound(run_folder: Path, *, strict: bool, topology: Topology) -> Path | None:
    """Return the newest checkpoint of a run that passes verification; None if the run has none.

    Damaged ones are renamed `step_XXXXXXXX.bad` and reported, and the next older one is tried. Collective over the
    world.

    Args:
        strict: whether to refuse instead of taking an older one.

    Raises:
        CheckpointError: none is undamaged or, with `strict`, the newest is damaged.
        StorageError: the folder cannot be read, a rank cannot read what the main rank can, or a damaged checkpoint
            still exists after it was renamed.
    """
    aside: set[Path] = set()
    while True:
        newer: list[Path] = []
        with main_rank_reports(f"reading {run_folder}", topology):
            found = newest_complete(run_folder) if topology.is_main else None
            if found is not None:
                newer = damaged(run_folder, after_step=step_of(found))
        folder = topology.from_main(found)
        problem = topology.from_main(f"{newer[0]} is damaged or incomplete" if newer else None)
        if problem is None:
            problem = problem_of(folder, topology) if folder is not None else None
            newer = [folder] if folder is not None and problem is not None else []
        if problem is None:
            if topology.is_main and folder is not None and (lost := lost_since(run_folder, folder)) is not None:
                log.warning(lost)
            return folder
        if strict:
            raise CheckpointError(f"{problem}; --strict-resume takes no older checkpoint; omit it to resume from one")
        with main_rank_reports(f"setting a damaged checkpoint of {run_folder} aside", topology):
            for path in newer if topology.is_main else []:
                if path in aside:  # the file system still shows a renamed folder: do not loop forever
                    raise StorageError(
                        f"{problem}; it was set aside, but {path} is still there; check the disk, move that folder "
                        "away and run the same command again"
                    )
                log.warning(f"{problem}; set aside as {set_aside(path)}")
                aside.add(path)


def problem_of(folder: Path, topology: Topology) -> str | None:
    """Return a sentence about the damage to a checkpoint's files; None if all hashes agree.

    Every rank reads its share of the files. What one rank finds damaged is read again by the main rank, because a
    single faulty node must not cause a checkpoint to be discarded. Collective over the world.

    Raises:
        StorageError: a rank cannot read the files, or reads other bytes than the main rank does.
    """
    ranks = topology.layout.world_size
    found = topology.gather_to_main(_problem_in(folder, topology.rank, ranks))
    verdict: tuple[str | None, bool] = (None, False)
    if topology.is_main:
        verdict = _confirmed(folder, [_Problem() if one is None else one for one in found or []], ranks)
    message, is_storage = topology.from_main(verdict)
    if is_storage:
        raise StorageError(message)
    return message


class _Problem(NamedTuple):
    """The result of one rank's verification of its share."""

    text: str | None = None
    is_unreadable: bool = False
    host: str = ""


def _problem_in(folder: Path, share: int, of: int) -> _Problem:
    try:
        verify_files(folder, hashes=True, share=share, of=of)
        if share == 0:
            read_index(folder)
    except CheckpointError as error:
        return _Problem(str(error), host=socket.gethostname())
    except OSError as error:
        return _Problem(f"{folder}: reading failed ({error.strerror or error})", True, socket.gethostname())
    return _Problem()


def _confirmed(folder: Path, problems: Sequence[_Problem], ranks: int) -> tuple[str | None, bool]:
    """Return (the first confirmed problem, whether the storage causes it).

    The main rank confirms a problem by reading the files itself.
    """
    for rank, problem in enumerate(problems):
        if problem.text is None:
            continue
        seen = problem if rank == 0 else _problem_in(folder, rank, ranks)
        if seen.is_unreadable or problem.is_unreadable:
            return f"rank {rank} on {problem.host}: {problem.text}; check that node and its mounts, then resume", True
        if seen.text is None:
            return (
                f"rank {rank} on {problem.host} reports: {problem.text}; the main rank reads it correctly, so check "
                "that node and its mounts, then resume",
                True,
            )
        return seen.text, False
    return None, False


def load(
    folder: Path,
    chunks: Sequence[ModelChunk],
    optimizer: SavableOptimizer | None,
    *,
    is_verified: bool = False,
    topology: Topology,
    platform: Platform,
) -> None:
    """Load weights and, if given, the optimizer's state from a checkpoint of any layout. Collective over the world.

    Args:
        chunks: the bare model chunks, not their data-parallel wrappers.
        is_verified: whether `newest_sound` has just verified the files.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, or holds a model of another shape.
    """
    if not is_verified and (problem := problem_of(folder, topology)) is not None:
        raise CheckpointError(problem)
    with library_failures(f"{folder} does not fit this model"), platform.scope(), quiet():
        state, _ = sharded_state(chunks, optimizer, topology, is_loading=True)
        if optimizer is not None:
            _name_masters_as_stored(state["optimizer"], read_index(folder).state_dict_metadata)
        with unpickle_plain_objects_only():
            loaded = cast(dict[str, Any], dist_checkpointing.load(state, str(folder)))
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[model_key(index, chunks)])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])


def _name_masters_as_stored(state: dict[str, Any], stored: Collection[str]) -> None:
    """Change the requested names of float32 master weights to the checkpoint's, and drop those it does not have.

    The distributed optimizer calls them `param`, the bf16 wrapper `fp32_param`, and the float32 wrapper saves none,
    since they are the model's weights.
    """
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory) and tensor.key not in stored:
            name = next((tensor.key.removeprefix(start) for start in _MASTERS if tensor.key.startswith(start)), None)
            tensor.key = next((f"{start}{name}" for start in _MASTERS if f"{start}{name}" in stored), tensor.key)
    for tensors in state.get("param_state", {}).values():
        if tensors["param"].key not in stored:
            del tensors["param"]
