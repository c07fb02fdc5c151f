"""The optimizer of a run: gradient norm, update, and the state on one rank or sharded over replicas.

`gradient_norm` replaces megatron-core's `clip_grads.py`, which without Transformer Engine and Apex waits for the device
once for every tensor, and scales every tensor through a copy.

megatron-core's distributed optimizer cuts the weights and gradients of any optimizer, and saves and loads the state of
Adam alone: it looks for `exp_avg`, `exp_avg_sq` and `step` by name. The subclass here does the same for the state that
a member declares, in the same format (`fully_reshardable`: each tensor of its parameter's shape). Line numbers are of
megatron-core 0.16.1, `optimizer/distrib_optimizer.py`.

State that was saved cut over data-parallel ranks can be loaded whole, and the other way round: its tensors are the
same, each of its parameter's shape. What surrounds them differs, and `in_the_form_of` brings it into the form that a
wrapper of megatron-core loads (`optimizer/optimizer.py` and `optimizer/distrib_optimizer.py` of 0.16.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
    param_group_identifier_keys,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from megadiff.config.registry import naming
from megadiff.optim.config import OptimizerConfig, Scale
from megadiff.optim.members import STEP, Member, load_member
from megadiff.optim.pieces import mark_pieces, parameter_groups, piece_of, unsent
from megadiff.optim.probe import refuse_unsavable
from megadiff.parallel.pipeline import DataParallelChunk
from megadiff.parallel.topology import Collectives, Topology
from megadiff.platform import megatron_versions
from megadiff.platform.machine import Platform


def in_the_form_of(wrapped: MegatronOptimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return loaded state as this wrapper's `load_state_dict` wants it, whichever wrapper saved it.

    Args:
        state: what dist_checkpointing has loaded for a request of this wrapper's: the tensors lie where the wrapper
            wants them, the parameter groups where the wrapper that saved them had them.
    """
    groups, step = _stored_groups(state)
    if isinstance(wrapped, DistributedOptimizer):
        named = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        if step is not None:
            named = [{**group, "step": float(step)} for group in named]
        return {
            "optimizer": {"param_groups": named},
            "param_state": state["param_state"],
            "param_state_sharding_type": "fully_reshardable",
        }
    inner = state if isinstance(wrapped, FP32Optimizer) else state["optimizer"]
    own = inner["param_groups"]
    tensors = {key: value for key, value in inner["state"].items() if key != "common_step"}
    if step is not None and any("step" in kept for kept in wrapped.optimizer.state.values()):
        tensors["common_step"] = torch.as_tensor(step, dtype=torch.float32)
    loaded = {
        "state": tensors,
        "param_groups": [{**group, "params": mine["params"]} for group, mine in zip(groups, own, strict=True)],
    }
    if isinstance(wrapped, FP32Optimizer):
        return loaded
    return {"optimizer": loaded, "fp32_from_fp16_params": state["fp32_from_fp16_params"]}


def keep_float32_state(wrapped: MegatronOptimizer, loaded: dict[str, Any], keys: Sequence[str]) -> None:
    """Put loaded state back as float32 where weights are bf16 without master weights.

    torch's `load_state_dict` converts state to the parameters' type, which would round it.

    Args:
        loaded: result of `in_the_form_of`.
        keys: names of the state's tensors.
    """
    if not isinstance(wrapped, FP32Optimizer):
        return
    parameters = [parameter for group in wrapped.optimizer.param_groups for parameter in group["params"]]
    for index, tensors in loaded["state"].items():
        state = wrapped.optimizer.state[parameters[index]]
        for key in keys:
            if key in tensors and state[key].dtype != tensors[key].dtype:
                state[key] = tensors[key].to(state[key].device)


def _stored_groups(state: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """Return the parameter groups as they were saved, and the number of steps if it is kept beside them or in them.

    The float32 wrapper saves them at the top; the other two below `optimizer`. A request leaves `params` alone at its
    own place, so groups that were saved there have more keys.
    """
    places = [place for place in (state, state.get("optimizer", {})) if len((place.get("param_groups") or [{}])[0]) > 1]
    groups = places[0]["param_groups"]
    step = places[0].get("state", {}).get("common_step")
    if step is None:
        step = next((group["step"] for group in groups if group.get("step") is not None), None)
    return groups, step


_PIECE = 2**16
_NORM_EPS = 1e-6
"""Added to the norm before dividing by it, as torch and megatron-core do."""


def gradient_norm(gradients: Sequence[Tensor], *, group: ProcessGroup | None, device: torch.device) -> Tensor:
    """Return the L2 norm over all ranks of a group, a float64 scalar on the device, without a host sync.

    Collective over the group: one all-reduce, also on a rank without gradients.

    Args:
        gradients: gradients of this rank; each element of the model's gradient is on one rank of the group alone.
        group: None for the whole world.
    """
    squares = sum_of_squares(gradients, device=device)
    if dist.get_world_size(group) > 1:
        dist.all_reduce(squares, group=group)
    return squares.sqrt()


def sum_of_squares(gradients: Sequence[Tensor], *, device: torch.device) -> Tensor:
    """Return the squared L2 norm of this rank's gradients, a float64 scalar on the device, without a host sync."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    pieces = [piece for gradient in gradients for piece in _pieces(gradient)]
    norms = torch._foreach_norm(pieces, 2, dtype=torch.float32)
    return torch.stack(norms).double().square().sum()


def clip_grad_norm_(gradients: Sequence[Tensor], limit: float, *, norm: float) -> None:
    """Clip gradients in place to a maximum global norm.

    Args:
        limit: maximum norm, above 0.
        norm: global norm of the model's gradient.
    """
    factor = limit / (norm + _NORM_EPS)
    if gradients and factor < 1.0:
        torch._foreach_mul_(list(gradients), factor)


def _pieces(gradient: Tensor) -> Sequence[Tensor]:
    """Return the pieces over which one float32 sum may run.

    On CPU torch adds up the squares of a tensor one after the other: at 8 million elements the norm is 2e-4 too small,
    and depends on how the layout cuts the tensor. CUDA's kernel adds up pairs.
    """
    if gradient.device.type != "cpu" or gradient.numel() <= _PIECE:
        return (gradient,)
    return gradient.view(-1).split(_PIECE)


class ShardedOptimizer(DistributedOptimizer):
    """A distributed optimizer that saves and loads whatever state its member declares."""

    def __init__(self, member: Member, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Cut the weights of `optimizer` over the ranks; the other arguments are the parent's.

        Line 514 accepts no other optimizer than Adam, so the parent is given one over the same groups, cuts its
        groups, and they are then taken over.
        """
        self._member = member
        standin = torch.optim.AdamW([dict(group) for group in optimizer.param_groups])
        super().__init__(standin, *args, **kwargs)
        for group, cut in zip(optimizer.param_groups, self.optimizer.param_groups, strict=True):
            group["params"] = cut["params"]
        optimizer.state.clear()
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return what is equal on all ranks: the groups without their parameters, and the count of steps in each."""
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        step = self._step()
        if step is not None:
            groups = [{**group, STEP: step} for group in groups]
        return {"optimizer": {"param_groups": groups}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over groups, the count of steps and, if there is `param_state`, the tensors."""
        stored = {_identity(group): group for group in state_dict["optimizer"]["param_groups"]}
        self._member.complete_state(self.optimizer)
        inner = self.optimizer.state_dict()
        groups = [{**stored[_identity(group)], "params": group["params"]} for group in inner["param_groups"]]
        step = next((group[STEP] for group in groups if group.get(STEP) is not None), None)
        for state in inner["state"].values() if step is not None else ():
            if STEP in state:  # a tensor for each parameter: a shared one would count once for each of them
                state[STEP] = torch.tensor(step, dtype=torch.float32)
        self.optimizer.load_state_dict({"state": inner["state"], "param_groups": groups})
        if "param_state" in state_dict:
            self.load_parameter_state_from_fully_reshardable(state_dict["param_state"])

    def get_parameter_state_dp_zero(
        self, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any]:
        """Return the weights and the declared state of whole gradient buffers on every rank.

        Collective over the data-parallel group. The format is nearly the parent's: for each buffer and its type, a
        float32 tensor on the host for each key. The parent leaves out the padding behind buckets, and then looks for
        parameters at their places with padding, so that state behind a padded bucket would be saved shifted
        (`sharded_param_state_fully_reshardable` of megatron-core 0.16 and 0.19); here it is kept.

        Args:
            use_gloo_comm: must be false.
            empty_data: return zeros, as places to load into.
            return_on_all_ranks: must be true.
        """
        assert return_on_all_ranks, "the memory-efficient variant of the format is not used"
        assert not use_gloo_comm
        keys = ("param", *self._member.state_keys)
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for index, (buffer, ranges) in enumerate(zip(self.buffers, self.gbuf_ranges, strict=True)):
            ((dtype, bucket_ranges),) = ranges.items()
            tensors = {key: torch.zeros(buffer.numel, dtype=torch.float32, device="cpu") for key in keys}
            for bucket, ranges_of_bucket in zip(buffer.buckets, bucket_ranges, strict=True) if not empty_data else ():
                place = slice(bucket.offset, bucket.offset + bucket.numel_unpadded)
                for key in keys:
                    whole = self._gathered(key, bucket.grad_data, ranges_of_bucket["param_map"])
                    tensors[key][place].copy_(whole[: bucket.numel_unpadded])
            state[index] = {dtype: tensors}
        return state

    def sharded_param_state_fully_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        """Return the parent's sharded state without the keys that a parameter's role does not keep.

        The parent gives every parameter of a gradient buffer the same keys; the places of others are zeros here.
        """
        state: Any = super().sharded_param_state_fully_reshardable(*args, **kwargs)
        parameters = [parameter for buffer in self.buffers for parameter in buffer.param_index_map]
        for index, parameter in enumerate(parameters):
            kept = self._member.keys_of(parameter)
            for key in self._member.state_keys:
                if key not in kept:
                    del state[index][key]
        return state

    def _gathered(self, key: str, gradients: torch.Tensor, ranges: Mapping[Any, Any]) -> torch.Tensor:
        """Return one kind of state of a whole bucket, from the parts of all data-parallel ranks.

        Args:
            key: `param` or a declared key.
            gradients: the bucket's gradients, for their number and device.
            ranges: where each of this rank's parameters lies in the rank's part.
        """
        ranks = self.data_parallel_group.size()
        part = torch.zeros(gradients.numel() // ranks, dtype=torch.float32, device=gradients.device)
        for parameter, places in ranges.items():
            if key != "param" and key not in self._member.keys_of(parameter):
                continue
            own = self._get_main_param_and_optimizer_states(parameter)[key]
            part[places["gbuf_local"].start : places["gbuf_local"].end].copy_(own.detach())
        parts = [torch.empty_like(part) for _ in range(ranks)]
        dist.all_gather(parts, part, group=self.data_parallel_group)
        return torch.cat(parts).cpu()

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Any]) -> None:
        """Copy loaded tensors into the declared state, and into the weights if the checkpoint has float32 ones.

        A float32 run without the distributed optimizer saves no master weights: they are the model's, loaded before.
        """
        group_index, group_order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group_index]["params"][group_order]
        if "param" in tensors:
            main.copy_(tensors["param"])
        for key in self._member.keys_of(main):
            self.optimizer.state[main][key].copy_(tensors[key])

    def _step(self) -> float | int | None:
        """Return the count of steps that all parameters or, where they have none, all groups with parameters share."""
        steps = {float(state[STEP]) for state in self.optimizer.state.values() if STEP in state}
        if not steps:  # fused kernels count in the groups, and not in empty ones
            steps = {int(group[STEP]) for group in self.optimizer.param_groups if group["params"] and STEP in group}
        assert len(steps) <= 1, f"parameters differ in their count of steps: {sorted(steps)}"
        return steps.pop() if steps else None


def _identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a parameter group from the others, here and in a checkpoint."""
    return tuple(group.get(key) for key in param_group_identifier_keys)


@dataclass(frozen=True)
class UpdateTraffic:
    """Communication of a rank in one update by an optimizer that puts pieces of matrices together."""

    data_bytes: int = 0
    """Bytes sent to other data-parallel ranks, parts of matrices to their owners and results from owners; as many are
    received."""
    matrices: int = 0
    """Number of weights of which this rank holds a part and others the rest."""
    owned: int = 0
    """Number of these on which this rank works for all."""
    tensor_calls: int = 0
    """Number of collectives between tensor ranks."""
    tensor_bytes: int = 0
    """Bytes that these reduce."""


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
        self._counted: list[torch.nn.Parameter] | None = None
        """Parameters whose gradients this rank counts in the norm; found by the first step, where all have one."""

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Return the global norm of the reduced gradients, a float64 scalar on the device, without a host sync.

        Collective over the model group, over the world with the distributed optimizer.
        """
        self._wrapped.prepare_grads()
        if self._counted is None:
            counted = {id(gradient) for gradient in megatron_versions.gradients_in_norm(self._wrapped)}
            self._counted = [p for p in self._wrapped.get_parameters() if id(p.grad) in counted]
        return gradient_norm(
            [p.grad for p in self._counted if p.grad is not None],
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

    def state_bytes(self) -> int:
        """Return the bytes of this rank's moments and float32 master weights, as they are from the first step on."""
        self._member.complete_state(self._wrapped.optimizer)
        held = [value for state in self._wrapped.optimizer.state.values() for value in state.values()]
        masters = getattr(self._wrapped, "fp32_from_float16_groups", ()) or getattr(
            self._wrapped, "shard_fp32_from_float16_groups", ()
        )
        held += [weight for group in masters for weight in group if weight is not None]
        return sum(value.numel() * value.element_size() for value in held if isinstance(value, Tensor))

    def update_traffic(self) -> UpdateTraffic:
        """Return the communication of one update, for an optimizer that puts pieces of matrices together.

        The update is taken on weights without values, and nothing is sent.
        """
        inner = self._wrapped.optimizer
        if not self._member.gathers:
            return UpdateTraffic()
        self._member.complete_state(inner)
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        split = [piece for piece in map(piece_of, parameters) if piece.role == "hidden" and piece.is_split]
        sent: list[Tensor] = []

        def count(messages: Sequence[dist.P2POp]) -> None:
            sent.extend(message.tensor for message in messages if message.op is dist.isend)

        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        with unsent(count), Collectives() as collectives, naming(self._member.module, "step"):
            inner.step()
        for parameter in parameters:
            parameter.grad = None
        owned = sum(piece.owner == dist.get_rank() for piece in split)
        data_bytes = sum(tensor.numel() * tensor.element_size() for tensor in sent)
        return UpdateTraffic(data_bytes, len(split), owned, collectives.calls, collectives.bytes)

    def zero_grad(self) -> None:
        """Clear the gradients of the last step."""
        self._wrapped.zero_grad()

    def take_weights(self) -> None:
        """Copy the model's weights into the float32 masters, after weights alone were loaded."""
        self._wrapped.reload_model_params()

    def sharded_state_dict(self, model_state: dict[str, Any], *, is_loading: bool, metadata: dict[str, Any]) -> Any:
        """Return the state for megatron-core's dist_checkpointing; see `megadiff.checkpoint.save`.

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
        tried_on = platform.device if platform.has_values else torch.device("cpu")
        refuse_unsavable(member, settings, scale, device=tried_on, is_cut=is_cut)
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
        wrapped.grad_stats_parallel_group = stats_group
        wrapped.tp_group = topology.tensor_group
        mark_pieces(wrapped, roles, topology)
        if is_allocated:  # when it was built, for weights that the wrapper may have replaced
            member.complete_state(base)
    return Optimizer(wrapped, member, settings, platform.device)
