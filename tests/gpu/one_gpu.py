"""A model with its optimizer on this process's device through the real builders, trained on fixed random sequences.

Imports nothing of the data path, so a machine with torch, megatron-core, pydantic and pytest alone can run it.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F

from megadiff.platform.machine import Platform, detect
from megadiff.platform.quiet import quiet

with quiet():
    from megatron.core.dist_checkpointing import ShardedTensor

    from megadiff.model.config import ModelConfig, PrecisionConfig
    from megadiff.model.denoiser import build_chunks, wrap_data_parallel
    from megadiff.model.initialisation import initialise, role_of
    from megadiff.optim.config import OPTIMIZERS, OptimizerConfig, Scale
    from megadiff.optim.optimizer import Optimizer, build_optimizer
    from megadiff.parallel.config import Layout, ParallelConfig
    from megadiff.parallel.pipeline import run_microbatches, set_loss_reduction
    from megadiff.parallel.topology import Topology, open_topology

DEVICE: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB, ROWS, MICROBATCHES = 512, 2, 2
WIDTH, LENGTH = (256, 128) if DEVICE == "cuda" else (128, 32)
PLAIN: dict[str, Any] = {"layers": 4, "hidden": WIDTH, "heads": 4, "seq_length": LENGTH, "head_init": 0.02}
GIDD: dict[str, Any] = {
    **PLAIN,
    "qk_norm": "full",
    "sink": True,
    "softcap": 30.0,
    "mlp_bias": True,
    "resid_scale": "completep",
    "head_scale": "completep",
}


@cache
def machine(layers: Literal["local", "transformer_engine"]) -> Platform:
    """The device with megatron-core made ready; the default group of one rank is opened once."""
    platform = detect(DEVICE, layers=layers)
    platform.prepare_megatron()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            platform.backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        atexit.register(torch.distributed.destroy_process_group)
    return platform


@dataclass
class Trainee:
    """A model under training."""

    chunks: Sequence[Any]
    wrapped: Sequence[Any]
    optimizer: Optimizer
    topology: Topology
    platform: Platform
    model: ModelConfig

    def step(self, number: int, lr: float = 1e-3) -> tuple[float, float]:
        """One step on sequences that depend on its number alone: (mean loss, gradient norm)."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = run_microbatches(
            self.wrapped,
            sequences_of(number, self.model.seq_length, self.platform.device),
            forward=lambda chunk, sequences: chunk(sequences[0]),
            loss=_loss,
            seq_length=self.model.seq_length,
            micro_batch_size=ROWS,
        )
        norm = float(self.optimizer.gradient_norm())
        self.optimizer.step(lr, norm=norm)
        return float(torch.stack(losses).sum()) / (MICROBATCHES * ROWS * self.model.seq_length), norm

    def train(self, steps: range) -> list[tuple[float, float]]:
        """Several steps."""
        return [self.step(number) for number in steps]

    @torch.no_grad()
    def logits(self, number: int = 0) -> torch.Tensor:
        """Of one microbatch, in evaluation mode, float32."""
        for chunk in self.wrapped:
            chunk.eval()
        found = self.wrapped[0](sequences_of(number, self.model.seq_length, self.platform.device)[0][0]).float()
        for chunk in self.wrapped:
            chunk.train()
        return found

    def weights(self) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
        """By name and place in a checkpoint, which are the same for both kinds of layers; float32."""
        state = self.chunks[0].sharded_state_dict(metadata={"dp_cp_group": self.topology.data_group})
        return {
            (shard.key, shard.global_offset): shard.data.detach().float().clone()
            for shard in state.values()
            if isinstance(shard, ShardedTensor)
        }


def sequences_of(number: int, length: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, targets) of every microbatch: a target is the sum of its id and the one before; there is much to learn."""
    draw = torch.Generator().manual_seed(1000 + number)
    found = []
    for _ in range(MICROBATCHES):
        ids = torch.randint(0, 64, (ROWS, length), generator=draw)
        found.append((ids.to(device), ((ids + ids.roll(1, dims=1)) % 64).to(device)))
    return found


def _loss(logits: torch.Tensor, sequences: tuple[torch.Tensor, torch.Tensor]) -> Any:
    targets = sequences[1].t().reshape(-1)
    total = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
    return total, torch.tensor(targets.numel(), dtype=torch.int32, device=logits.device), total.detach().clone()


def trainee(
    model: dict[str, Any],
    layers: Literal["local", "transformer_engine"] = "local",
    *,
    precision: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
) -> Trainee:
    """Build it, weights drawn from seed 0."""
    platform = machine(layers)
    shape = ModelConfig.model_validate(model)
    numbers = PrecisionConfig.model_validate(precision or {})
    cut = ParallelConfig.model_validate(parallel or {})
    topology = open_topology(Layout(1, 1, 1, 1, MICROBATCHES))
    chunks = build_chunks(
        shape, vocab_size=VOCAB, parallel=cut, precision=numbers, platform=platform, topology=topology
    )
    initialise(chunks, shape, seed=0, topology=topology)
    wrapped = wrap_data_parallel(chunks, parallel=cut, precision=numbers)
    set_loss_reduction(wrapped, topology, mean=True)
    built = build_optimizer(
        wrapped,
        [(role_of(name), parameter) for chunk in chunks for name, parameter in chunk.named_parameters()],
        OPTIMIZERS.build(OptimizerConfig, **{"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0, **(optimizer or {})}),
        scale=Scale(hidden=shape.hidden, layers=shape.layers, tokens_per_step=1, reduction="mean"),
        is_bf16=numbers.compute == "bf16",
        master_weights=numbers.master_weights,
        distributed=cut.distributed_optimizer,
        platform=platform,
        topology=topology,
    )
    return Trainee(chunks, wrapped, built, topology, platform, shape)
