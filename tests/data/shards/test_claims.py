"""A unit is taken by one process at a time, and again when that process is gone."""

import fcntl
import multiprocessing
import os
import signal

import orjson
import pytest

from megadiff.data.shards import ledger as module
from megadiff.data.shards.ledger import Claims
from megadiff.errors import DataError

FORK = multiprocessing.get_context("fork")


def take_and_wait(folder, connection):
    claim = Claims(folder).take("000001")
    assert claim is not None
    connection.send(claim.maker)
    connection.recv()


@pytest.fixture
def holder(tmp_path):
    """Another process that has taken the unit, and the word for its claim."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=take_and_wait, args=(tmp_path, theirs))
    process.start()
    yield process, ours.recv()
    process.kill()
    process.join()


def test_a_unit_is_taken_once_and_given_back(tmp_path):
    claims, others = Claims(tmp_path), Claims(tmp_path)
    claim = claims.take("000001")
    assert claim is not None
    with claim:
        assert others.take("000001") is None
        other = others.take("000002")
        assert other is not None
        with other:
            assert sorted(os.listdir(tmp_path)) == ["000001", "000002"]
    assert os.listdir(tmp_path) == []


def test_the_unit_of_a_killed_process_is_free_at_once(tmp_path, holder):
    process, maker = holder
    assert Claims(tmp_path).take("000001") is None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    claim = Claims(tmp_path).take("000001")
    assert claim is not None
    with claim:
        assert claim.dead_maker == maker


def rewrite(path, **facts):
    found = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps({**found, **facts}))


def test_a_process_elsewhere_is_dead_when_it_gives_no_sign(tmp_path, holder, monkeypatch):
    """Its lock is gone, or was never seen here; as long as its file changes it lives."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    process, maker = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    file, claims = tmp_path / "000001", Claims(tmp_path)
    for beats in range(1, 4):
        rewrite(file, machine="elsewhere", beats=beats)
        assert claims.take("000001") is None
        now[0] += module.PATIENCE_S - 1
        assert claims.take("000001") is None
    now[0] += 2
    claim = claims.take("000001")
    assert claim is not None
    with claim:
        assert claim.dead_maker == maker


def test_a_file_system_without_locks_is_judged_by_signs_alone(tmp_path, monkeypatch):
    now = [0.0]

    def unsupported(*given):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(module, "_SETTLING_S", 0.01)
    claims, others = Claims(tmp_path), Claims(tmp_path)
    claim = claims.take("000001")
    assert claim is not None
    for _ in range(3):
        assert others.take("000001") is None
        now[0] += module.PATIENCE_S + 1
        claim.beat()
    claim.leave()
    assert others.take("000001") is None
    now[0] += module.PATIENCE_S + 1
    taken = others.take("000001")
    assert taken is not None
    with taken:
        assert taken.dead_maker == claim.maker


def test_an_unreadable_claim_is_nobodys(tmp_path):
    for content in (b"", b"{", b"[]", b'{"maker": "../../x", "machine": "m"}', b'{"maker": 3}'):
        (tmp_path / "000001").write_bytes(content)
        claim = Claims(tmp_path).take("000001")
        assert claim is not None
        with claim:
            assert claim.dead_maker is None


def test_a_link_in_place_of_a_claim_is_refused(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "000001").symlink_to("precious")
    with pytest.raises(DataError, match=r"000001: cannot be written \(Too many levels of symbolic links\)"):
        Claims(tmp_path).take("000001")
    assert (tmp_path / "precious").read_text() == "kept"
