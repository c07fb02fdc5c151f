"""Scaling: laws as data, counts of FLOPs, and measurements over models of many sizes.

`published/` holds law files, which `laws` reads and writes in one format; `flops` counts the FLOPs that they speak of.
`planner` turns a budget and the laws into a run; `optimum` and `coordinates` serve the sweeps that measure optimal
learning rates and slopes of activation sizes. Nothing here imports torch.
"""
