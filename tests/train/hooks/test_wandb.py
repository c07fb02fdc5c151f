"""The sink for Weights & Biases in offline mode: what W&B's own reader finds in its files."""

from __future__ import annotations

import json
import struct
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from megadiff.config.load import load_config
from megadiff.errors import ConfigError
from megadiff.run.config import RunConfig
from megadiff.train.hooks import wandb as member
from tests.support.runs import toy_config, toy_tree

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed (pip install wandb)")
ENTRY = {"name": "wandb", "project": "a-project", "mode": "offline", "tags": ["a", "b"]}


def records(folder):
    """[the records of every offline run, in the order of their starts], each a list of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [[Record.FromString(data) for data in chunks(path.read_bytes())] for path in paths]


def chunks(content):
    """The payloads of LevelDB's log format, in blocks of 32 KiB, behind W&B's header of 7 bytes."""
    place, parts = 7, []
    while place < len(content):
        if (left := 2**15 - place % 2**15) < 7:  # too short for a header
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        parts.append(content[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def history(run):
    """The sequences of a run: [{name: value}]."""
    sequences = []
    for record in run:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            sequences.append({key: value for key, value in items.items() if not key.startswith("_")})
    return sequences


def line(step):
    return {"step": step, "loss": step / 8, "elbo": float("nan"), "mfu": None, "epochs": {"a": 0.5}, "lr": 1e-3}


def write(config, steps):
    sink = member.build(config.hooks[0], SimpleNamespace(config=config, folder=config.folder))
    sink.open()
    for step in steps:
        sink.write(line(step), step)
    sink.write({"step": steps[-1], "eval_elbo": 3.5}, steps[-1])
    sink.close()
    sink.close()  # a run that fails while it closes closes again


@needs_wandb
def test_curves_are_in_the_files_and_a_resumed_run_continues_in_wandb(toy_corpus, tmp_path):
    import wandb

    config = toy_config(toy_corpus, tmp_path, hooks=[ENTRY])
    config.folder.mkdir()
    write(config, [1, 2, 3, 4, 5])
    write(config, [4, 5, 6])  # resumed from a checkpoint of step 3
    wandb.teardown()
    runs = records(config.folder)
    assert len(runs) == 2
    started = [next(record.run for record in run if record.HasField("run")) for run in runs]
    wanted = json.loads((config.folder / "wandb.json").read_text())["id"]
    assert [run.run_id for run in started] == [wanted, wanted]
    assert (started[0].project, started[0].display_name, list(started[0].tags)) == ("a-project", "toy", ["a", "b"])
    settings = {update.key: json.loads(update.value_json) for update in started[0].config.update}
    assert settings["optimizer"]["lr"] == config.optimizer.lr
    for run, steps in zip(runs, ([1, 2, 3, 4, 5], [4, 5, 6]), strict=True):
        *training, evaluation = history(run)
        points = [{"step": s, "train/loss": s / 8, "train/lr": 1e-3, "epochs/a": 0.5} for s in steps]
        assert training == points
        assert evaluation == {"step": steps[-1], "eval/elbo": 3.5}
        axes = {(m.metric.name or m.metric.glob_name): m.metric.step_metric for m in run if m.HasField("metric")}
        assert axes.get("train/loss", axes.get("*")) == "step"


@needs_wandb
def test_a_damaged_id_begins_a_new_wandb_run(tmp_path, caplog):
    (tmp_path / "wandb.json").write_text('{"id": "../../x"}')
    found = member._run_id(tmp_path / "wandb.json")
    assert member._ID.fullmatch(found)
    assert member._run_id(tmp_path / "wandb.json") == found
    assert "holds no id of a W&B run" in caplog.text


def test_without_wandb_the_description_is_refused_with_what_to_do(toy_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(member, "find_spec", lambda name: None)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**toy_tree(toy_corpus, tmp_path), "hooks": [ENTRY]}))
    with pytest.raises(ConfigError, match=r"hooks\.0.*`wandb` is not installed; run `pip install wandb`"):
        load_config(path, [], RunConfig)


def test_the_library_is_imported_only_when_a_run_uses_it():
    assert "wandb" not in sys.modules or find_spec("wandb") is not None
    assert not hasattr(member, "wandb")
