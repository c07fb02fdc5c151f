"""Optimizer steps: the step, the loop, metrics, hooks."""
