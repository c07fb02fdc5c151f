"""Optimizer state that was saved cut over data-parallel ranks, loaded whole, and the other way round.

The tensors of both are the same, each of its parameter's shape (`distrib_optim_sharding_type` is
`fully_reshardable`); what surrounds them differs, and is brought here into the form that a wrapper loads. Names are of
megatron-core 0.16.1, `optimizer/optimizer.py` and `optimizer/distrib_optimizer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer, MegatronOptimizer


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
