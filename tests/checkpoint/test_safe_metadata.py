from __future__ import annotations

import os
import pickle

import pytest

from megadiff.checkpoint.safe_metadata import read_index
from megadiff.errors import CheckpointError


class _Canary:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, call, *arguments):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("call", [os.system, eval, exec, open])
def test_a_hostile_index_is_refused_and_runs_nothing(tmp_path, call):
    canary = tmp_path / "canary"
    argument = {os.system: f"touch {canary}", open: str(canary)}.get(call, f"open({str(canary)!r}, 'w')")
    arguments = (argument, "w") if call is open else (argument,)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Canary(call, *arguments)))
    pickle.loads((tmp_path / ".metadata").read_bytes())  # noqa: S301  the control
    assert canary.exists(), "an ordinary unpickler would run it"
    canary.unlink()

    with pytest.raises(CheckpointError, match=r"is not a checkpoint index and was not loaded: it names \w+\.\w+"):
        read_index(tmp_path)

    assert not canary.exists()


@pytest.mark.parametrize("name", ["torch.load", "torch.hub.load", "torch.distributed.checkpoint.metadata.os"])
def test_an_allowed_module_does_not_bring_its_other_names(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(CheckpointError, match="it names"):
        read_index(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle at all"])
def test_a_damaged_index_is_said(tmp_path, content):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged \(.*\); take another checkpoint"):
        read_index(tmp_path)


def test_a_missing_index_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"\.metadata is missing: the checkpoint is damaged"):
        read_index(tmp_path)
