"""Scaling: laws as data, counts of FLOPs, fits, plans, and measurements over models of many sizes.

`published/` holds law files, which `laws` reads and writes in one format; `flops` counts the FLOPs that they speak of.
`planner` turns a budget and the laws into a run. `points` gathers the losses of a sweep, `fit`, `isoflop` and
`comparisons` fit laws to them with intervals that resample whole runs, `fit_results` puts them together and `figures`
draws them; `power` simulates a sweep before it is trained, and `paired` compares two runs over the same validation
sequences. `optimum` serves the sweeps that measure optimal learning rates and slopes of activation
sizes. Nothing here imports torch.
"""
