"""Measurements over models of many sizes: slopes of activation sizes, and optimal learning rates."""
