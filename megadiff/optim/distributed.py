"""megadiff's subclass of megatron-core's distributed optimizer: three defects around Adam's `step` mended.

They show only while the optimizer's per-parameter state holds a `step` tensor, as torch's AdamW does (no Transformer
Engine, no Apex), on a GPU host as on CPU; with a fused Adam the subclass changes nothing. Line numbers are of
megatron-core 0.16.1, `optimizer/distrib_optimizer.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class ResumableDistributedOptimizer(DistributedOptimizer):
    """Saves before the first step and goes on after a load with the same `step` for every parameter."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, with the state allocated first: line 642 asserts that some `step` exists."""
        allocate_state(self.optimizer)
        return super().sharded_state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the parent's, with one `step` per parameter afterwards.

        Lines 817-825 give all parameters the same tensor, so each Adam step would count once per parameter: the first
        loss after a resume is right and later ones drift.
        """
        super().load_state_dict(state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].detach().clone()

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Any]) -> None:
        """Copy as the parent does, but keep the destination's own `step`, and its own weights where none were saved.

        Lines 933-940 look for a `step` the fully reshardable format does not store (KeyError), or copy a stale one.
        A float32 run without the distributed optimizer saves no master weights: they are the model's, loaded before.
        """
        group_index, group_order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group_index]["params"][group_order]
        own = {"param": main, **self.optimizer.state[main]}
        tensors = {"param": main, **tensors}
        if "step" in own:
            tensors["step"] = own["step"]
        super()._set_main_param_and_optimizer_states(model_param, tensors)


def allocate_state(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Give parameters without state the zero state Adam's first step would; megatron-core's `init_state_fn`."""
    keeps_step = isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        # torch keeps `step` on the device only for kernels that read it there.
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            if len(optimizer.state[parameter]) == 0:
                if keeps_step:
                    device = parameter.device if on_device else torch.device("cpu")
                    optimizer.state[parameter]["step"] = torch.zeros((), device=device)
                for moment in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[parameter][moment] = torch.zeros_like(parameter.data, dtype=torch.float32)
