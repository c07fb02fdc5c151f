"""The contract of an optimizer: what it keeps is declared, and a run with it resumes bit for bit on any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megadiff.metric_lines import read_metrics
from megadiff.model.initialisation import role_of
from megadiff.optim.config import OPTIMIZERS, OptimizerConfig, Scale
from megadiff.optim.members import Member, load_member
from megadiff.optim.probe import refuse_unsavable
from megadiff.platform.quiet import quiet
from megadiff.run.config import RunConfig
from megadiff.testing.ranks import on_ranks
from megadiff.testing.toy_run import toy_config, wire_on_rank, write_corpus

SAVED, STEPS = 2, 4
"""Step of the checkpoint that is carried over other layouts, and number of steps of a run."""
_AWAY_RANKS = 4
_MASTERS = {"param", "fp32_param"}
"""Names of the float32 copies of weights in a checkpoint."""

KINDS = {"fp32": ("fp32", False), "bf16": ("bf16", False), "distributed": ("bf16", True)}
"""Precision of the model, with master weights if it is bf16, and whether the optimizer is distributed, by name."""


@dataclass(frozen=True)
class _Case:
    """A member under one of the wrappers that a run may use."""

    member: Member
    settings: Mapping[str, Any]
    is_distributed: bool
    compute: str

    def config(self, folder: Path, run: str, **dotted: Any) -> RunConfig:
        """Return a run of this case; `run` is `whole`, `away` or `back`."""
        return toy_config(
            folder / "corpus",
            folder / run,
            name=f"{self.member.name}-{self.compute}-{'distributed' if self.is_distributed else 'plain'}",
            model__layers=2,
            data__valid=[],
            optimizer={"lr": 1e-3, "weight_decay": 0.1, **self.settings, "name": self.member.name},
            precision__compute=self.compute,
            parallel__distributed_optimizer=self.is_distributed,
            schedule={"steps": STEPS, "warmup_steps": 1},
            checkpoint={"every": SAVED, "keep": 0, "async": False, **dotted.pop("checkpoint", {})},
            **dotted,
        )

    def away(self, folder: Path) -> RunConfig:
        """Return the run on the other layout: tensor and data parallel, or pipeline and data where tensors stay whole.

        It begins with the saved step of the run on one rank.
        """
        split = "parallel__tensor" if self.member.takes_pieces else "parallel__pipeline"
        start = self.config(folder, "whole").folder / _step_folder(SAVED)
        return self.config(folder, "away", checkpoint={"start_from": str(start)}, **{split: 2})

    def back(self, folder: Path) -> RunConfig:
        """Return the run on one rank that begins with what the other layout saved."""
        start = self.away(folder).folder / _step_folder(SAVED)
        return self.config(folder, "back", checkpoint={"start_from": str(start)})


def check_optimizer(
    *members: str | ModuleType, settings: Mapping[str, Any] | None = None, kinds: Sequence[str] = tuple(KINDS)
) -> None:
    """Check members of the optimizer family.

    Checked are: the state that a member declares is what it keeps; it begins from its `initial_state`; it updates
    elements by their own values alone if it is `ELEMENTWISE`. Then a toy model is trained on one CPU rank, its
    checkpoint is loaded on four ranks (tensor x data parallel) and saved there at once, and the run goes on from that
    on one rank: every stored tensor, and the losses and gradient norms to the last step, must be the same bits. This
    is done in float32, in bf16 with master weights, and with `parallel.distributed_optimizer`.

    Takes about two CPU seconds for each member and kind, after importing torch and megatron-core. Processes are
    forked, so nothing may have opened a process group, and torch should use one thread (`torch.set_num_threads(1)`).

    Args:
        members: names, dotted paths or modules. They are trained together, which saves starting processes.
        settings: settings under `optimizer:` for all of them.
        kinds: names in `KINDS` to try; `distributed` is left out for a member that needs whole tensors.

    Raises:
        ConfigError: a member does not follow the contract; the sentence names what to change.
        AssertionError: a resumed run is another run.
    """
    cases = [case for member in members for case in _cases(_name(member), dict(settings or {}), kinds)]
    with TemporaryDirectory() as name, quiet():
        folder = Path(name)
        write_corpus(folder / "corpus", tokens=1500)
        on_ranks(1, _train, [case.config(folder, "whole") for case in cases])
        on_ranks(_AWAY_RANKS, _save_at_once, [case.away(folder) for case in cases])
        on_ranks(1, _train, [case.back(folder) for case in cases])
        for case in cases:
            _compare(case, folder)


def _name(member: str | ModuleType) -> str:
    if isinstance(member, str):
        return member
    package, _, name = member.__name__.rpartition(".")
    return name if package == OPTIMIZERS.package else member.__name__


def _cases(name: str, settings: dict[str, Any], kinds: Sequence[str]) -> list[_Case]:
    member = load_member(name)
    section = OPTIMIZERS.build(OptimizerConfig, **{"lr": 1e-3, **settings, "name": name})
    refuse_unsavable(
        member,
        section,
        Scale(hidden=32, layers=2, tokens_per_step=128, reduction="mean"),
        device=torch.device("cpu"),
        is_cut=member.takes_pieces,
    )
    wrappers = [KINDS[kind] for kind in kinds]
    return [
        _Case(member, settings, is_distributed, compute)
        for compute, is_distributed in wrappers
        if member.takes_pieces or not is_distributed
    ]


def _train(configs: Sequence[RunConfig]) -> None:
    for config in configs:
        wire_on_rank(config, 1).train()


def _save_at_once(configs: Sequence[RunConfig]) -> None:
    for config in configs:
        run = wire_on_rank(config, _AWAY_RANKS)
        assert run.first_step == SAVED, f"{config.name}: the checkpoint of step {SAVED} was not loaded"
        run.checkpoint.save_now(SAVED)
        run.close()


def _compare(case: _Case, folder: Path) -> None:
    whole, away, back = case.config(folder, "whole"), case.away(folder), case.back(folder)
    kept: dict[str, set[str]] = {}
    for key in _stored(whole, SAVED):
        if key.startswith("optimizer.state."):
            kind, _, parameter = key.removeprefix("optimizer.state.").partition(".")
            kept.setdefault(parameter, set()).add(kind)
    for parameter, kinds in kept.items():
        wanted, found = set(case.member.keys_of_role(role_of(parameter))), kinds - _MASTERS
        assert found == wanted, (
            f"{whole.name}: a checkpoint holds {', '.join(sorted(found)) or 'no state'} of {parameter}, and "
            f"{', '.join(sorted(wanted)) or 'no state'} is declared"
        )
    _assert_same(whole.name, "saved on another layout", _stored(whole, SAVED), _stored(away, SAVED))
    lines = [
        [(line["loss"], line["grad_norm"]) for line in read_metrics(config.folder / "metrics.jsonl") if "loss" in line]
        for config in (whole, back)
    ]
    assert lines[0][SAVED:] == lines[1], f"{whole.name}: the resumed run is another run: {lines[0][SAVED:]} {lines[1]}"
    _assert_same(whole.name, "at the end of the resumed run", _stored(whole, STEPS), _stored(back, STEPS))


def _assert_same(name: str, where: str, one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys(), f"{name}: other tensors {where}: {sorted(one.keys() ^ other.keys())}"
    differing = [key for key in one if not torch.equal(one[key], other[key])]
    assert not differing, f"{name}: other values {where}: {', '.join(differing[:4])}"


def _stored(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint as it is stored, whole."""
    reader = dcp.FileSystemReader(config.folder / _step_folder(step))
    sizes: dict[str, Any] = {
        key: entry for key, entry in reader.read_metadata().state_dict_metadata.items() if hasattr(entry, "size")
    }
    state = {key: torch.zeros(entry.size, dtype=entry.properties.dtype) for key, entry in sizes.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def _step_folder(step: int) -> str:
    return f"checkpoints/step_{step:08d}"
