"""The optimizer of a run: a family member inside megatron-core's precision and sharding wrapper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor

from megadiff.optim.config import OptimizerConfig
from megadiff.optim.distributed import ShardedOptimizer
from megadiff.optim.gradient_norm import clip_grad_norm_, gradient_norm
from megadiff.optim.groups import parameter_groups
from megadiff.optim.member import Member, load_member
from megadiff.optim.probe import refuse_unsavable
from megadiff.optim.resharding import in_the_form_of, keep_float32_state
from megadiff.optim.rules import Scale
from megadiff.parallel.pipeline import DataParallelChunk
from megadiff.parallel.topology import Topology
from megadiff.platform.machine import Platform


class Optimizer:
    """Optimizer steps on reduced gradients, whichever of megatron-core's wrappers is used."""

    def __init__(
        self, wrapped: MegatronOptimizer, member: Member, settings: OptimizerConfig, device: torch.device
    ) -> None:
        self._wrapped = wrapped
        self._member = member
        self._settings = settings
        self._device = device
        self.kernel = member.kernel(wrapped.optimizer)
        """Name of the update kernel, for the log."""

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Return the global norm of the reduced gradients, a float64 scalar on the device, without a host sync.

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
            norm: result of `gradient_norm`, called before.
        """
        for group in self._wrapped.param_groups:
            group["lr"] = lr * group["lr_mult"]
        if self._settings.clip_grad > 0:
            gradients = [p.grad for p in self._wrapped.get_parameters() if p.grad is not None]
            clip_grad_norm_(gradients, self._settings.clip_grad, norm=norm)
        self._wrapped.step_with_ready_grads()

    def zero_grad(self) -> None:
        """Clear the gradients of the last step."""
        self._wrapped.zero_grad()

    def take_weights(self) -> None:
        """Copy the model's weights into the float32 masters, after weights alone were loaded."""
        self._wrapped.reload_model_params()

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]) -> Any:
        """Return the state for megatron-core's dist_checkpointing; see `megadiff.checkpoint.snapshot`.

        Raises:
            ConfigError: the optimizer keeps state that its module does not declare.
        """
        self._member.check_state(self._wrapped.optimizer)
        self._member.complete_state(self._wrapped.optimizer)
        return self._wrapped.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)

    def load_state_dict(self, state: Any) -> None:
        """Take over the state a checkpoint held, cut over data-parallel ranks or not; the settings stay this run's.

        megatron-core's wrappers replace whole groups, so without this a changed decay, beta or epsilon would be
        recorded and not used.
        """
        inner, changing = self._wrapped.optimizer, ("params", *self._member.group_state_keys)
        settings = [{k: v for k, v in group.items() if k not in changing} for group in inner.param_groups]
        loaded = in_the_form_of(self._wrapped, state)
        self._wrapped.load_state_dict(loaded)
        for group, own in zip(inner.param_groups, settings, strict=True):
            kept = {key: group[key] for key in changing if key in group}
            group.clear()
            group.update(own | kept)
        keep_float32_state(self._wrapped, loaded, self._member.state_keys)
        self._member.complete_state(inner)


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
        scale: sizes on which epsilon depends.
        master_weights: keep float32 copies of bf16 weights; without them the plain wrapper updates bf16 in place.

    Raises:
        ConfigError: there is no such optimizer, or a run with it could not be saved and resumed.
    """
    member = load_member(settings.name)
    is_cut = distributed or topology.layout.tensor > 1
    with platform.scope():
        refuse_unsavable(member, settings, scale, device=platform.device, is_cut=is_cut)
        base = member.build(parameter_groups(roles, settings, scale), settings)
        is_allocated = bool(base.state)
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            bf16=is_bf16,
            params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
            use_distributed_optimizer=distributed,
            clip_grad=settings.clip_grad,
        )
        no_scaler: Any = None  # bf16 needs no loss scaling

        def allocate(optimizer: torch.optim.Optimizer, _: Any = None) -> None:
            member.complete_state(optimizer)

        stats_group = topology.model_group
        if distributed:
            wrapped: Any = ShardedOptimizer(
                member,
                base,
                config,
                no_scaler,
                allocate,
                model_chunks=list(chunks),
                per_model_buffers={index: chunk.buffers for index, chunk in enumerate(chunks)},  # type: ignore[misc]
                data_parallel_group=topology.data_group,
                data_parallel_group_gloo=None,
                data_parallel_group_idx=dist.get_rank(topology.model_group),
                distributed_optimizer_instance_id=0,
            )
            stats_group = dist.group.WORLD
        elif is_bf16 and master_weights:
            wrapped = Float16OptimizerWithFloat16Params(base, config, no_scaler, allocate)
            base.state.clear()
        else:
            wrapped = FP32Optimizer(base, config, allocate)
        if is_allocated:  # when it was built, for weights that the wrapper may have replaced
            member.complete_state(base)
        wrapped.grad_stats_parallel_group = stats_group
        wrapped.tp_group = topology.tensor_group
    return Optimizer(wrapped, member, settings, platform.device)
