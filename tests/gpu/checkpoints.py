"""A model of `one_gpu` to a checkpoint's sharded files and back, as a run saves and loads them."""

from __future__ import annotations

from pathlib import Path

from megatron.core import dist_checkpointing

from megadiff.checkpoint.safe_metadata import unpickle_plain_objects_only
from megadiff.checkpoint.save import HostBuffers, model_key, sharded_state, take_snapshot
from tests.gpu.one_gpu import Trainee


def save(trained: Trainee, folder: Path) -> None:
    """Weights, optimizer and FP8 scales into the new `folder`."""
    folder.mkdir()
    snapshot = take_snapshot(
        folder,
        trained.chunks,
        trained.optimizer,
        buffers=HostBuffers(trained.platform),
        check_sharding=True,
        topology=trained.topology,
        platform=trained.platform,
    )
    snapshot.write_index([snapshot.write().results])


def load(trained: Trainee, folder: Path) -> None:
    """All of it back, with nothing unpickled but plain data."""
    state, _ = sharded_state(trained.chunks, trained.optimizer, trained.topology, is_loading=True)
    with unpickle_plain_objects_only():
        loaded = dist_checkpointing.load(state, str(folder))
    for index, chunk in enumerate(trained.chunks):
        chunk.load_state_dict(loaded[model_key(index, trained.chunks)])
    trained.optimizer.load_state_dict(loaded["optimizer"])
