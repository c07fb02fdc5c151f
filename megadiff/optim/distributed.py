"""Optimizer state cut over data-parallel ranks, for any member of the optimizer family.

megatron-core's distributed optimizer cuts the weights and gradients of any optimizer, and saves and loads the state of
Adam alone: it looks for `exp_avg`, `exp_avg_sq` and `step` by name. The subclass here does the same for the state that
a member declares, in the same format (`fully_reshardable`: each tensor of its parameter's shape). Line numbers are of
megatron-core 0.16.1, `optimizer/distrib_optimizer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megadiff.optim.member import STEP, Member


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

        Collective over the data-parallel group. The format is the parent's: for each buffer and its type, a float32
        tensor on the host for each key, without the padding between buckets.

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
            tensors = {key: torch.zeros(buffer.numel_unpadded, dtype=torch.float32, device="cpu") for key in keys}
            start = 0
            for bucket, ranges_of_bucket in zip(buffer.buckets, bucket_ranges, strict=True) if not empty_data else ():
                end = start + bucket.numel_unpadded
                for key in keys:
                    whole = self._gathered(key, bucket.grad_data, ranges_of_bucket["param_map"])
                    tensors[key][start:end].copy_(whole[: bucket.numel_unpadded])
                start = end
            state[index] = {dtype: {**tensors, "numel_unpadded": buffer.numel_unpadded}}
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
        for key in self._member.state_keys:
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
    return tuple(group[key] for key in param_group_identifier_keys)
