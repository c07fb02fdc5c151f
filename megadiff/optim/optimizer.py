"""The optimizer of a run: a family member inside megatron-core's precision and sharding wrapper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor

from megadiff.config import registry
from megadiff.optim.config import MEMBERS, OptimizerConfig
from megadiff.optim.distributed import ResumableDistributedOptimizer, allocate_state
from megadiff.optim.gradient_norm import gradient_norm, hold_to_norm
from megadiff.optim.groups import parameter_groups
from megadiff.optim.resharding import in_the_form_of
from megadiff.optim.rules import Scale
from megadiff.parallel.pipeline import DataParallelChunk
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform


class Optimizer:
    """Takes optimizer steps on reduced gradients; all that the training loop sees of megatron-core's wrappers."""

    def __init__(
        self, wrapped: MegatronOptimizer, settings: OptimizerConfig, device: torch.device, kernel: str
    ) -> None:
        self._wrapped = wrapped
        self._settings = settings
        self._device = device
        self.kernel = kernel
        """Name of the update kernel, for the log."""

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The global norm of the reduced gradients, a float64 scalar on the device, for which the host does not wait.

        Collective over the model group, over the world with the distributed optimizer.
        """
        self._wrapped.prepare_grads()
        return gradient_norm(
            self._wrapped.get_main_grads_for_grad_norm(),
            group=self._wrapped.get_grad_stats_parallel_group(),
            device=self._device,
        )

    @torch.no_grad()
    def step(self, lr: float, *, norm: float) -> None:
        """Clip if configured and update the weights. Collective over the data group with the distributed optimizer.

        Args:
            lr: learning rate now; each group multiplies it by its own factor.
            norm: what `gradient_norm`, called before, gave.
        """
        for group in self._wrapped.param_groups:
            group["lr"] = lr * group["lr_mult"]
        if self._settings.clip_grad > 0:
            gradients = [p.grad for p in self._wrapped.get_parameters() if p.grad is not None]
            hold_to_norm(gradients, self._settings.clip_grad, norm=norm)
        self._wrapped.step_with_ready_grads()

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self._wrapped.zero_grad()

    def take_weights(self) -> None:
        """Copy the model's weights into the float32 masters, after weights alone were loaded."""
        self._wrapped.reload_model_params()

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]) -> Any:
        """State as megatron-core's dist_checkpointing wants it; see `megadiff.checkpoint.store`."""
        return self._wrapped.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)

    def load_state_dict(self, state: Any) -> None:
        """Take over the state a checkpoint held, sharded over data ranks or not; the settings stay this run's.

        megatron-core's wrappers replace whole groups, so without this a changed decay, beta or epsilon would be
        recorded and not used.
        """
        settings = [
            {key: group[key] for key in ("betas", "eps", "weight_decay") if key in group}
            for group in self._wrapped.param_groups
        ]
        self._wrapped.load_state_dict(in_the_form_of(self._wrapped, state))
        for group, own in zip(self._wrapped.param_groups, settings, strict=True):
            group.update(own)


def build_optimizer(
    chunks: Sequence[DataParallelChunk],
    roles: Sequence[tuple[str, torch.nn.Parameter]],
    settings: OptimizerConfig,
    *,
    scale: Scale,
    is_bf16: bool,
    master_weights: bool = True,
    distributed: bool,
    platform: Platform,
    topology: Topology,
) -> Optimizer:
    """Build the family member `settings.name` over `roles` and wrap it.

    megatron-core's `get_megatron_optimizer` knows only Adam and SGD and groups by its own rules; the wrappers it
    chooses between are used here directly: float32, bf16 with float32 master weights, or sharded over data ranks.

    Args:
        chunks: data-parallel wrapped model chunks.
        roles: (role, parameter) of every parameter of this rank.
        scale: what epsilon depends on.
        master_weights: keep float32 copies of bf16 weights; without them the plain wrapper updates bf16 in place.

    Raises:
        ConfigError: no such optimizer.
    """
    member = registry.member(MEMBERS, settings.name)
    with platform.scope():
        groups = parameter_groups(roles, settings, scale)
        base = member.build(groups, settings)
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            bf16=is_bf16,
            params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
            use_distributed_optimizer=distributed,
            clip_grad=settings.clip_grad,
        )
        no_scaler: Any = None  # bf16 needs no loss scaling
        if distributed:
            wrapped: Any = ResumableDistributedOptimizer(
                base,
                config,
                no_scaler,
                allocate_state,
                model_chunks=list(chunks),
                per_model_buffers={index: chunk.buffers for index, chunk in enumerate(chunks)},  # type: ignore[misc]
                data_parallel_group=topology.data_group,
                data_parallel_group_gloo=None,
                data_parallel_group_idx=dist.get_rank(topology.model_group),
                distributed_optimizer_instance_id=0,
            )
            stats_group = dist.group.WORLD
        elif is_bf16 and master_weights:
            wrapped, stats_group = (
                Float16OptimizerWithFloat16Params(base, config, no_scaler, allocate_state),
                topology.model_group,
            )
        else:
            wrapped, stats_group = FP32Optimizer(base, config, allocate_state), topology.model_group
        wrapped.grad_stats_parallel_group = stats_group
        wrapped.tp_group = topology.tensor_group
    return Optimizer(wrapped, settings, platform.device, member.kernel())
