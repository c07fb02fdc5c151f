"""The optimizer family: a file's name is its name in the YAML.

Each member has `build(groups, settings) -> torch.optim.AdamW` (or a subclass of it: megatron-core's distributed
optimizer takes nothing else) whose per-parameter state is `exp_avg`, `exp_avg_sq` and, in torch's kernels, `step`.
"""
