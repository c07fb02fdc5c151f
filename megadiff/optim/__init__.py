"""Optimizers (a family), parameter groups and learning-rate schedules."""
