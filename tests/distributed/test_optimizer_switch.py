"""`parallel.distributed_optimizer` turned on or off at a resume: the same state, bit for bit, on any number of ranks.

The state is compared where it is stored, one tensor for every parameter; the curve is compared with that of a run
that never changed. `MEGADIFF_EVERY_SWITCH=1` adds kinds and directions.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.support.ranks import on_ranks
from tests.support.runs import read_metrics, toy_config, train_all

LEFT, STEPS = 3, 6
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "laprop_bf16": {"optimizer__name": "laprop", "precision__compute": "bf16"},
    "muon": {"optimizer__name": "muon"},
}
SWITCHES = [(False, True, (1, 2)), (True, False, (2, 1))]
"""Whether the state is sharded before and after, and the numbers of ranks."""
if os.environ.get("MEGADIFF_EVERY_SWITCH") == "1":
    KINDS |= {"bf16": {"precision__compute": "bf16"}, "laprop": {"optimizer__name": "laprop"}}
    SWITCHES += [(False, True, (2, 1)), (True, False, (1, 2))]


def _config(corpus: Path, output: Path, name: str, is_sharded: bool, steps: int, **kind: Any) -> Any:
    return toy_config(
        corpus,
        output,
        name=name,
        model__layers=1,
        data__valid=[],
        parallel__distributed_optimizer=is_sharded,
        schedule={"steps": steps, "warmup_steps": 2},
        checkpoint={"every": LEFT, "keep": 0, "async": False},
        **kind,
    )


@pytest.fixture(scope="module")
def trained(toy_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both kinds on one and two ranks to the last step, and copies of them resumed the other way."""
    root = tmp_path_factory.mktemp("switch")
    for ranks in (1, 2):
        starts = sorted({before for before, _, (old, _) in SWITCHES if old == ranks})
        configs = [
            _config(toy_corpus, root, f"{kind}-{before}-{ranks}", before, STEPS, **settings)
            for kind, settings in KINDS.items()
            for before in starts
        ]
        on_ranks(ranks, train_all, configs, ranks, save=True)
    for ranks in (1, 2):
        resumed = []
        for kind, settings in KINDS.items():
            for before, after, (old, new) in SWITCHES:
                if new != ranks:
                    continue
                name = _switched(kind, before, old)
                shutil.copytree(root / f"{kind}-{before}-{old}", root / name)
                shutil.rmtree(root / name / f"checkpoints/step_{STEPS:08d}")
                (root / name / "LATEST").unlink()
                resumed.append(_config(toy_corpus, root, name, after, STEPS, **settings))
        on_ranks(ranks, train_all, resumed, ranks, save=True)
        on_ranks(ranks, _save_what_was_loaded, resumed)
    return root


def _switched(kind: str, before: bool, ranks: int) -> str:
    return f"{kind}-switched-from-{before}-{ranks}"


def _save_what_was_loaded(configs: list[Any]) -> None:
    """Resume from the older checkpoint again and save it at once, without a step, under `loaded/`."""
    import torch.distributed as dist

    from tests.support.runs import wire_on_rank

    for config in configs:
        elsewhere = config.model_copy(update={"output_dir": str(config.folder / "loaded")})
        if dist.get_rank() == 0:
            source = config.folder / f"checkpoints/step_{LEFT:08d}"
            shutil.copytree(source, elsewhere.folder / f"checkpoints/step_{LEFT:08d}")
        dist.barrier()
        run = wire_on_rank(elsewhere, dist.get_world_size())
        assert run.first_step == LEFT
        checkpointer = run.checkpoint.checkpointer
        outcome = checkpointer.start(run.checkpoint.manifest(LEFT + 1)) or checkpointer.finish()
        assert outcome is not None
        assert outcome.error is None
        run.close()


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, master weights under one name."""
    reader = dcp.FileSystemReader(folder)
    sizes = {
        key: (entry.size, entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    state = {key: torch.zeros(size, dtype=dtype) for key, (size, dtype) in sizes.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {key.replace("optimizer.state.fp32_param.", "optimizer.state.param."): value for key, value in state.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after", "ranks"), SWITCHES)
def test_every_moment_and_master_weight_is_taken_over_bit_for_bit(
    trained: Path, kind: str, before: bool, after: bool, ranks: tuple[int, int]
) -> None:
    run = trained / _switched(kind, before, ranks[0])
    saved = _stored(run / f"checkpoints/step_{LEFT:08d}")
    loaded = _stored(run / "loaded" / run.name / f"checkpoints/step_{LEFT + 1:08d}")
    common = saved.keys() & loaded.keys()
    moments = [key for key in common if "exp_avg" in key]
    second = {key.removeprefix("optimizer.state.exp_avg_sq.") for key in moments if ".exp_avg_sq." in key}
    parameters = {key.removeprefix("optimizer.state.exp_avg.") for key in moments if ".exp_avg." in key}
    matrices = {name for name in parameters if "linear" in name and "norm" not in name}
    assert len(matrices) == 4
    assert len(moments) == len(parameters) + len(second)
    assert second == (parameters - matrices if kind == "muon" else parameters)
    assert any(saved[key].abs().max() > 0 for key in moments)
    for key in common:
        assert torch.equal(saved[key], loaded[key]), key
    masters = "optimizer.state.param."
    for key in loaded.keys() - saved.keys():  # float32: the weights are their own masters
        assert key.startswith(masters)
        assert torch.equal(loaded[key], saved[key.removeprefix(masters)]), key
    assert all(key.startswith(masters) for key in saved.keys() - loaded.keys())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after", "ranks"), SWITCHES)
def test_the_curve_goes_on_as_if_nothing_had_been_changed(
    trained: Path, kind: str, before: bool, after: bool, ranks: tuple[int, int]
) -> None:
    """Another number of ranks sums in another order; the wrappers differ in no step's arithmetic."""
    wanted, found = (
        [(line["loss"], line["grad_norm"]) for line in read_metrics(trained / name / "metrics.jsonl")]
        for name in (f"{kind}-{before}-{ranks[0]}", _switched(kind, before, ranks[0]))
    )
    assert len(wanted) == len(found) == STEPS
    tolerance = 2e-3 if "bf16" in kind else 1e-5
    for step in range(LEFT, STEPS):
        assert found[step] == pytest.approx(wanted[step], rel=tolerance), step


def test_the_change_is_recorded(trained: Path) -> None:
    manifest = json.loads(
        (trained / _switched("fp32", False, 1) / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text()
    )
    (change,) = [change for change in manifest["changes"] if change["key"] == "parallel.distributed_optimizer"]
    assert change == {"after_step": LEFT, "key": change["key"], "before": False, "now": True}
